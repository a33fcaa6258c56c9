import pytest

from model.cache_layout import CacheLayout, KeyForm


@pytest.mark.parametrize(("key_form", "width"), [("float32", 704), ("int8", 609)])
def test_docstring_example(key_form: KeyForm, width: int) -> None:
    layout = CacheLayout(latent=512, rope=64, index=128, key_form=key_form)
    assert (layout.key_begin, layout.width) == (576, width)

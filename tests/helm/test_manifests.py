"""The plain manifests in k8s/ are what the chart renders, and stand on their own."""

import pytest
import yaml

from cluster.render import MANIFEST_DIR, SAMPLES, SECRET_NAME, manifest_text, render_chart
from wire.errors import ConfigError


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.file_name)
def test_file_is_current(sample, helm):
    committed = (MANIFEST_DIR / sample.file_name).read_text()
    assert committed == manifest_text(helm, sample), "run: python -m cluster.render manifests --helm BIN"


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.file_name)
def test_objects_match_schemas(sample, manifest_errors):
    text = (MANIFEST_DIR / sample.file_name).read_text()
    objects = [doc for doc in yaml.safe_load_all(text) if doc]
    wrong = {item["metadata"]["name"]: manifest_errors(item) for item in objects}
    assert {name: errors for name, errors in wrong.items() if errors} == {}
    assert len(objects) >= 14
    assert not any("helm.sh/hook" in str(item["metadata"].get("annotations")) for item in objects)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.file_name)
def test_token_comes_from_a_secret_that_the_header_makes(sample):
    text = (MANIFEST_DIR / sample.file_name).read_text()
    assert f"create secret generic {SECRET_NAME}" in text
    assert f"name: {SECRET_NAME}" in text
    assert "kind: Secret" not in text


def test_every_file_has_a_sample():
    assert {path.name for path in MANIFEST_DIR.glob("*.yaml")} == {s.file_name for s in SAMPLES}


def test_refused_values_raise_with_helms_words(helm):
    with pytest.raises(ConfigError, match="backend"):
        render_chart(helm, settings=["backend=nomad"])

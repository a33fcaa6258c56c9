"""The page accounts of a running cluster's attention workers, read from their metrics."""

from e2e_cluster import Running, scrape, wait_until

ROLES = ("prefill", "decode", "both")


def _samples(cluster: Running) -> dict[str, dict[str, float]]:
    """Attention worker -> its metrics."""
    members = cluster.shell.members()
    return {
        name: scrape(member["metrics_address"]) for name, member in members.items() if name.startswith(ROLES)
    }


def used_pages(cluster: Running) -> dict[str, float]:
    """Attention worker -> pages that sequences own."""
    return {name: found['moray_attention_pages{state="used"}'] for name, found in _samples(cluster).items()}


def check_books(cluster: Running) -> None:
    """No worker lost or doubled a page."""
    members = cluster.shell.members()
    for name, found in _samples(cluster).items():
        assert found["moray_attention_integrity_errors_total"] == 0
        pages = [value for key, value in found.items() if key.startswith("moray_attention_pages{")]
        assert sum(pages) == members[name]["num_pages"]


def wait_no_page_is_used(cluster: Running) -> None:
    """Returns when no sequence owns a page any more, and the accounts are right."""
    wait_until(lambda: not any(used_pages(cluster).values()), what="the pages to be free")
    check_books(cluster)

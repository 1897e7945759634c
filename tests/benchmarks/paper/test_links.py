import pytest

from benchmarks.paper.links import communication_share, middle_share, read_links
from benchmarks.paper.plan import ADPSGD, CPSGD_8, MATCHED, QSGD, RARE
from tests.benchmarks.paper.samples import write_link


@pytest.mark.parametrize(("computes", "communicates", "period"), [(1.0, 1.0, 8), (3.0, 1.0, 4), (1.0, 5.0, 2)])
def test_share_of_communication_follows_from_the_speedup(computes, communicates, period):
    speedup = (computes + communicates) / (computes + communicates / period)
    share = communicates / (computes + communicates)
    assert communication_share(speedup, period) == pytest.approx(share)


def test_middle_share_is_that_of_the_geometric_mean():
    assert middle_share((1.2, 1.2)) == pytest.approx(communication_share(1.2))
    assert middle_share((1.0, 4.0)) == pytest.approx(communication_share(2.0))


def test_measurements_on_links_are_read_from_their_files(tmp_path):
    assert read_links(tmp_path) == {}
    write_link(tmp_path, "10 Gbps")
    (link,) = read_links(tmp_path).values()
    assert link.command == "python -m benchmarks.link"
    assert (link.lost, link.mean_period) == (0.5, 5.1)
    assert link.speedup(ADPSGD) == link.speedup(MATCHED) == pytest.approx(0.2 / 0.11)
    assert link.speedup(CPSGD_8) == pytest.approx(1.6)
    assert link.speedup(RARE) is None
    assert link.seconds(QSGD) == 0.15

"""The benchmark of searches: lists that agree, the refusal of those that do not, HNSW's efSearch, a run's files."""

import importlib
import json
import sys

import numpy as np
import pytest

from benchmarks import search

TINY = ["--items", "300", "--width", "32", "--queries", "8", "--k", "3", "--shortlist", "40", "--shortlist-dim", "4"]
OURS = {"exact", "exact, blocks of 64", "adaptive", "funnel"}
FAISS = {"FAISS IndexFlatL2", "FAISS IndexFlatL2, BLAS", "FAISS IndexHNSWFlat"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The figures of a tiny run."""
    monkeypatch.setattr(search, "SAMPLE_S", 0.0)

    def figures(*options):
        file = tmp_path / "figures.json"
        assert search.main([*TINY, "--block", "64", "--rounds", "2", "--json", str(file), *options]) == 0
        return json.loads(file.read_text())

    return figures


def test_a_run_measures_every_search_and_leaves_its_figures(run, capsys):
    faiss = pytest.importorskip("faiss", reason="the rival is FAISS: pip install 'jaxpapers[bench]'")
    threshold = faiss.cvar.distance_compute_blas_threshold
    figures = run("--faiss-threads", "1")
    assert figures["environment"]["faiss threads"] == 1
    assert {name: len(times) for name, times in figures["seconds"].items()} == dict.fromkeys(OURS | FAISS, 2)
    recall = figures["recall"]
    exact = {name for name, value in recall.items() if value == 1}
    assert exact >= {"exact", "exact, blocks of 64", "FAISS IndexFlatL2", "FAISS IndexFlatL2, BLAS"}
    assert recall["FAISS IndexHNSWFlat"] >= recall["adaptive"] > 0.5
    assert figures["hnsw"]["efSearch"] in search.EF_SEARCH
    assert figures["hnsw"]["construction_s"] > 0
    assert faiss.cvar.distance_compute_blas_threshold == threshold
    printed = capsys.readouterr().out
    assert "HNSW's construction took" in printed
    assert "recall@3" in printed


def test_without_faiss_it_takes_no_part(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    figures = run()
    assert set(figures["seconds"]) == set(figures["recall"]) == OURS
    assert "hnsw" not in figures
    assert "FAISS takes no part" in capsys.readouterr().out


def test_hnsw_takes_no_part_where_no_ef_search_suffices(run, monkeypatch, capsys):
    pytest.importorskip("faiss", reason="the rival is FAISS: pip install 'jaxpapers[bench]'")
    monkeypatch.setattr(search, "choose_ef", lambda recall_at, least: None)
    figures = run()
    assert "FAISS IndexHNSWFlat" not in figures["seconds"]
    assert figures["hnsw"]["efSearch"] is None
    assert "HNSW takes no part: up to efSearch 4096" in capsys.readouterr().out


def test_exact_lists_that_differ_are_not_timed(run, monkeypatch):
    pytest.importorskip("faiss", reason="the rival is FAISS: pip install 'jaxpapers[bench]'")
    right = search.exact_search

    def by_a_prefix(queries, database, k, **options):
        return right(queries, database, k, **{"dim": 8, **options})

    monkeypatch.setattr(search, "exact_search", by_a_prefix)
    monkeypatch.setattr(search, "paired_times", lambda *_: pytest.fail("timed all the same"))
    with pytest.raises(SystemExit, match="FAISS IndexFlatL2: squared distances"):
        run()


def test_ties_agree_and_other_neighbours_do_not():
    expected = np.array([[0.1, 0.2, 0.3], [0.4, 0.4, 0.5]])
    search.refuse_disagreement("here", expected + 1e-7, expected)
    for wrong in (0.301, np.inf, np.nan):
        found = expected.copy()
        found[0, 2] = wrong
        with pytest.raises(SystemExit, match="here: squared distances"):
            search.refuse_disagreement("here", found, expected)


def test_distances_are_those_of_unit_vectors():
    database, queries = np.float32([[3, 0], [0, 5], [-2, 0], [1, 1]]), np.float32([[7, 0]])
    found = search.squared_distances(np.array([[0, 3, 1, 2, -1]]), queries, database)
    np.testing.assert_allclose(found, [[0, 2 - np.sqrt(2), 2, 4, np.inf]], atol=1e-15)  # 2 - 2 cos


def test_recall_counts_the_exact_neighbours_and_their_ties():
    database, queries = np.float32([[1, 0], [1, 0.1], [1, -0.1], [0, 1]]), np.float32([[1, 0]])
    recall = search.agreeing_recall({"exact": lambda: np.array([[0, 1]])}, queries, database)
    lists = ([0, 1], [0, 2], [0, 3], [3, -1])  # rows 1 and 2 are equally far
    assert [recall(np.array([each])) for each in lists] == [1, 1, 0.5, 0]


def test_the_smallest_ef_search_of_enough_recall_is_chosen():
    tried = []

    def recall_at(ef):
        tried.append(ef)
        return {16: 0.5, 32: 0.9, 64: 0.95}.get(ef, 0.99)

    assert search.choose_ef(recall_at, 0.9) == 32
    assert tried == [16, 32]
    assert search.choose_ef(recall_at, 0.96) == 128
    assert search.choose_ef(recall_at, 0.999) is None
    assert tried[-1] == 4096


def test_the_funnel_of_the_defaults_is_the_papers():
    assert search.funnel_stages(256, 16, 200, 10) == ((32, 64, 128, 256), (100, 50, 25, 10))
    assert search.funnel_stages(48, 16, 20, 8) == ((32, 48), (10, 8))
    assert search.funnel_stages(16, 16, 20, 8) == ((16,), (8,))


def test_coordinates_matter_less_and_less():
    database, queries = (np.asarray(each) for each in search.embeddings(2000, 100, 64))
    assert (database.shape, queries.shape) == ((2000, 64), (100, 64))
    spread = np.concatenate([database, queries]).std(axis=0)
    # Half of the variance is that of 40 centres, known to a factor of some 1.2.
    np.testing.assert_allclose(spread * (1 + np.arange(64)) ** search.DECAY, np.sqrt(2), rtol=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--queries", "0"], "at least 1"),
        (["--faiss-threads", "0"], "at least 1"),
        (["--k", "41"], "k 41, short-list 40"),
        (["--shortlist", "301"], "short-list 301, items 300"),
        (["--shortlist-dim", "33"], "a prefix of 33 exceeds the width 32"),
    ],
)
def test_sizes_that_do_not_match_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        search.main([*TINY, *options])
    assert message in capsys.readouterr().err


def test_it_stands_in_the_list(capsys):
    assert importlib.import_module("benchmarks.__main__").main([]) == 0
    assert "search       Nearest neighbours" in capsys.readouterr().out

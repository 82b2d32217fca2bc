"""Matryoshka: golden figures of the authors' heads, and cascade, reranking, baselines by independent routes."""

import itertools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from experiments.timing import residuals, temporary_bytes
from jaxpapers.nn.resnet import ResNet
from jaxpapers.representation import matryoshka as mrl
from jaxpapers.representation.matryoshka import retrieval
from jaxpapers.train import make_mesh

# The search runs compiled: op by op it would compile dozens of small programs.
search = jax.jit(mrl.exact_search, static_argnames=("k", "dim", "block", "query_block"))
rerank = jax.jit(mrl.rerank, static_argnames=("dim", "mesh", "query_block"))
funnel = jax.jit(mrl.funnel, static_argnames=("dims", "lengths", "mesh"))
measures = jax.jit(mrl.retrieval_metrics, static_argnames="k")
cascade = jax.jit(mrl.cascade, static_argnames="max_exit")
GOLDEN = Path(__file__).parents[1] / "golden" / "matryoshka"
NESTING, CLASSES, BATCH = (2, 4, 8, 16), 5, 6
Z = np.random.default_rng(0).normal(size=(BATCH, 16)).astype(np.float32)
LABELS = np.array([1, 4, 0, 4, 2, 3], np.int32)


# ---- heads and losses


@pytest.fixture(scope="module")
def heads():
    return np.load(GOLDEN / "heads.npz")


def state_dict(golden, prefix):
    """The golden arrays by their names in PyTorch: `nesting_classifier_0_weight` is `nesting_classifier_0.weight`."""
    found = {}
    for name in golden.files:
        layer, _, kind = name.removeprefix(prefix).rpartition("_")
        if name.startswith(prefix) and kind in ("weight", "bias"):
            found[f"{layer}.{kind}" if layer else kind] = golden[name]
    return found


@pytest.mark.parametrize(("name", "tied"), [("mrl", False), ("mrle", True)])
def test_golden_heads(heads, name, tied):
    head = mrl.NestedHead(CLASSES, tuple(heads["nesting"].tolist()), tied)
    params = mrl.params_from_torch(state_dict(heads, f"{name}_param_"), tied)

    @jax.jit
    def loss(params, z):
        logits = head.apply({"params": params}, z)
        return mrl.nested_cross_entropy(logits, heads["labels"], heads["importance"], 0.1), logits

    (value, logits), (grads, grad_z) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, heads["features"])
    same = partial(np.testing.assert_allclose, atol=1e-5)  # the card's
    same(logits, heads[f"{name}_logits"])
    same(value, heads[f"{name}_loss"])
    same(grad_z, heads[f"{name}_grad_features"])
    same(mrl.margin_score(logits), heads[f"{name}_margin_score"])
    expected = mrl.params_from_torch(state_dict(heads, f"{name}_grad_"), tied)
    jax.tree.map(same, grads, expected)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == mrl.head_parameters(NESTING, CLASSES, tied)


def test_golden_fixed_features(heads):
    head = mrl.FixedFeatureHead(CLASSES, int(heads["ff_dim"]))
    params = mrl.params_from_torch(state_dict(heads, "ff_param_"))
    logits = head.apply({"params": params}, heads["features"])
    np.testing.assert_allclose(logits, heads["ff_logits"], atol=1e-5)


def test_resnet50_has_the_papers_number_of_columns():
    sizes = mrl.log_spaced_sizes(2048)
    assert sizes == (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    assert mrl.head_parameters(sizes, 1, use_bias=False) == 4088
    assert mrl.head_parameters(sizes, 1000, tied=True) == 2049 * 1000
    assert mrl.log_spaced_sizes(768) == (12, 24, 48, 96, 192, 384, 768)
    assert mrl.uniform_sizes(2048, 11) == (8, 212, 416, 620, 824, 1028, 1232, 1436, 1640, 1844, 2048)  # MRL-Uniform


@pytest.fixture(scope="module", params=[False, True], ids=["mrl", "mrl_e"])
def nested(request):
    """A head in float64 and its loss; compiled once."""
    with jax.enable_x64(True):
        head = mrl.NestedHead(CLASSES, NESTING, request.param)
        z = jnp.asarray(Z, jnp.float64)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), head.init(jax.random.key(1), z)["params"])

        def loss(params, z, importance, smoothing=0.1):
            return mrl.nested_cross_entropy(head.apply({"params": params}, z), LABELS, importance, smoothing)

        yield head, params, z, jax.jit(jax.value_and_grad(loss, (0, 1)))


def matrices(head, params, tied_bias=None):
    """W^(m) (classes, m) and b^(m) of every size, in numpy."""
    if head.tied:
        return [(np.asarray(params["kernel"]).T[:, :m], np.asarray(params["bias"])) for m in NESTING]
    layers = [params[f"head_{i}"] for i in range(len(NESTING))]
    return [(np.asarray(layer["kernel"]).T, np.asarray(layer["bias"])) for layer in layers]


def test_the_loss_is_equation_1(nested):
    head, params, z, loss = nested
    with jax.enable_x64(True):
        importance = jnp.array([2.0, 1.5, 1.0, 0.5])
        value, _ = loss(params, z, importance)
    expected = 0.0
    for c, m, (W, b) in zip(importance, NESTING, matrices(head, params), strict=True):
        log_p = log_softmax(Z[:, :m].astype(np.float64) @ W.T + b, axis=1)
        target = 0.9 * np.eye(CLASSES)[LABELS] + 0.1 / CLASSES
        expected += float(c) * np.mean(-np.sum(target * log_p, axis=1))
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_importance_is_linear_and_zero_removes_a_head(nested):
    head, params, z, loss = nested
    with jax.enable_x64(True):
        ones = [loss(params, z, jnp.eye(4)[i]) for i in range(4)]
        mixed, grads = loss(params, z, jnp.array([2.0, 0.0, 1.0, 0.5]))
        weights = (2.0, 0.0, 1.0, 0.5)
        expected = sum(c * value for c, (value, _) in zip(weights, ones, strict=True))
        np.testing.assert_allclose(mixed, expected, rtol=1e-12)
        expected = jax.tree.map(
            lambda *leaves: sum(c * leaf for c, leaf in zip(weights, leaves, strict=True)), *(g for _, g in ones)
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14), grads, expected)
        if not head.tied:
            assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(grads[0]["head_1"]))
        # Coordinate j has gradient from the heads with m > j alone.
        for m, (_, (_, grad_z)) in zip(NESTING, ones, strict=True):
            assert (np.asarray(grad_z)[:, m:] == 0).all()
            assert (np.abs(np.asarray(grad_z)[:, :m]) > 0).all()


def test_tied_heads_share_their_matrix_and_their_work(nested):
    head, params, z, loss = nested
    if not head.tied:
        pytest.skip("of MRL-E")
    with jax.enable_x64(True):
        logits = np.asarray(head.apply({"params": params}, z))
        for i, (low, high) in enumerate(itertools.pairwise(NESTING)):
            block = np.asarray(z)[:, low:high] @ np.asarray(params["kernel"])[low:high]
            np.testing.assert_allclose(logits[i + 1] - logits[i], block, atol=1e-12)
        np.testing.assert_allclose(logits[-1], np.asarray(z) @ params["kernel"] + params["bias"], atol=1e-12)
        # The gradient of column j is the sum of those of the heads with m > j.
        whole = loss(params, z, jnp.ones(4))[1][0]["kernel"]
        single = [np.asarray(loss(params, z, jnp.eye(4)[i])[1][0]["kernel"]) for i in range(4)]
        for j in range(16):
            expected = sum(grad[j] for m, grad in zip(NESTING, single, strict=True) if m > j)
            np.testing.assert_allclose(whole[j], expected, rtol=1e-10)
        work = jax.make_jaxpr(lambda z: head.apply({"params": params}, z))(z).jaxpr
        products = [eqn for eqn in work.eqns if eqn.primitive.name == "dot_general"]
        assert sum(eqn.invars[1].aval.shape[0] for eqn in products) == 16  # d, not the sum of all sizes


def test_one_size_is_the_plain_head():
    head = mrl.NestedHead(CLASSES, (16,))
    params = head.init(jax.random.key(0), Z)["params"]
    logits = head.apply({"params": params}, Z)
    plain = Z @ params["head_0"]["kernel"] + params["head_0"]["bias"]
    np.testing.assert_allclose(logits[0], plain, atol=1e-6)
    expected = -np.mean(log_softmax(np.asarray(plain), axis=1)[np.arange(BATCH), LABELS])
    np.testing.assert_allclose(mrl.nested_cross_entropy(logits, LABELS), expected, rtol=1e-6)
    assert np.abs(params["head_0"]["kernel"]).max() <= 1 / 4  # torch.nn.Linear's
    assert np.abs(mrl.NestedHead(400, (2, 16)).init(jax.random.key(0), Z)["params"]["head_0"]["kernel"]).max() > 0.5
    without = mrl.NestedHead(CLASSES, NESTING, tied=True, use_bias=False).init(jax.random.key(0), Z)["params"]
    assert set(without) == {"kernel"}


def test_fixed_features_do_not_see_the_others():
    head = mrl.FixedFeatureHead(CLASSES, 4)
    params = head.init(jax.random.key(0), Z)

    def loss(z, dim=None):
        if dim is None:
            logits = head.apply(params, z)
        else:
            kernel = jnp.pad(params["params"]["head"]["kernel"], ((0, 12), (0, 0)), constant_values=9.0)
            logits = mrl.keep_first(z, dim) @ kernel + params["params"]["head"]["bias"]
        return jnp.mean(mrl.cross_entropy(logits, LABELS))

    grad = jax.grad(loss)(jnp.asarray(Z))
    assert (grad[:, 4:] == 0).all()
    assert (grad[:, :4] != 0).all()
    # A mask of a traced size is the same baseline: how a population of sizes trains in one program.
    value, masked = jax.jit(jax.value_and_grad(loss))(jnp.asarray(Z), 4)
    np.testing.assert_allclose(value, loss(Z), rtol=1e-6)
    np.testing.assert_allclose(masked, grad, atol=1e-7)


def numpy_info_nce(u, v, temperature, normalize=True):
    if normalize:
        u, v = (part / np.linalg.norm(part, axis=1)[:, None] for part in (u, v))
    scores = u @ v.T / temperature
    rows, columns = (logsumexp(scores, axis=axis) - np.diag(scores) for axis in (1, 0))
    return (rows.mean() + columns.mean()) / 2


def test_contrastive_loss_normalises_every_prefix():
    with jax.enable_x64(True):
        u, v = np.random.default_rng(1).normal(size=(2, 7, 16))
        c = np.array([1, 0, 2.0, 0.5])
        loss = jax.jit(mrl.nested_contrastive, static_argnums=(2, 3))
        value = loss(u, v, NESTING, 0.2, c)
        expected = sum(w * numpy_info_nce(u[:, :m], v[:, :m], 0.2) for w, m in zip(c, NESTING, strict=True))
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        np.testing.assert_allclose(loss(3 * u, v, NESTING, 0.2, c), value, rtol=1e-12)
        np.testing.assert_allclose(loss(u, v, (16,), 0.2), numpy_info_nce(u, v, 0.2), rtol=1e-12)
        plain = partial(mrl.nested_contrastive, nesting=NESTING, temperature=0.2, importance=c, normalize=False)
        value, grad = jax.jit(jax.value_and_grad(plain))(u, v)
        terms = [numpy_info_nce(u[:, :m], v[:, :m], 0.2, normalize=False) for m in NESTING]
        np.testing.assert_allclose(value, np.dot(c, terms), rtol=1e-12)
        assert (np.abs(grad) > 0).all()
        assert all(array.shape != (7, 7) for array in residuals(plain, u, v))  # no similarities


def test_masked_language_loss_is_the_tied_loss():
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        h, E, bias = (jnp.asarray(rng.normal(size=shape)) for shape in ((2, 3, 16), (11, 16), (11,)))
        targets, masked = rng.integers(0, 11, size=(2, 3)), np.array([[1.0, 0, 1], [0, 0, 1]])
        logits = mrl.nested_mlm_logits(h, E, NESTING, bias)
        for m, found in zip(NESTING, logits, strict=True):
            np.testing.assert_allclose(found, h[..., :m] @ E[:, :m].T + bias, atol=1e-12)
        picked = masked > 0
        importance = (2.0, 1.0, 1.0, 0.5)

        def reference(h, E):
            logits = mrl.nested_mlm_logits(h, E, NESTING, bias)
            return mrl.nested_cross_entropy(logits[:, picked], targets[picked], importance)

        ours = partial(mrl.nested_mlm_loss, targets=targets, nesting=NESTING, bias=bias, importance=importance)
        value, grads = jax.jit(jax.value_and_grad(lambda h, E: ours(h, E, weights=masked), (0, 1)))(h, E)
        expected, expected_grads = jax.jit(jax.value_and_grad(reference, (0, 1)))(h, E)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), grads, expected_grads)
        whole = mrl.nested_cross_entropy(logits.reshape(4, 6, 11), targets.ravel(), importance)
        np.testing.assert_allclose(jax.jit(ours)(h, E), whole, rtol=1e-12)
        assert all(array.shape != (2, 3, 11) for array in residuals(ours, h, E))  # no logits


# ---- prefixes


def test_truncation_cuts_then_normalises():
    np.testing.assert_allclose(jnp.linalg.norm(mrl.truncate(Z, 5), axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(mrl.truncate(Z, 5, normalize=False), Z[:, :5])
    # The other order gives another ranking.
    first = np.argsort(-(Z[:, :3] / np.linalg.norm(Z, axis=1)[:, None]) @ Z[0, :3])
    assert not np.array_equal(first, np.argsort(-mrl.truncate(Z, 3) @ Z[0, :3]))
    zero = jnp.zeros((1, 4)).at[0, 3].set(1)
    value, grad = jax.value_and_grad(lambda z: jnp.sum(mrl.truncate(z, 3)))(zero)
    assert value == 0
    assert np.isfinite(grad).all()
    assert mrl.truncate(Z.astype(jnp.bfloat16), 3).dtype == jnp.bfloat16


def test_between_the_sizes():
    assert mrl.sizes_between((4, 8, 16, 32, 64, 128, 256)) == (6, 12, 24, 48, 96, 192)
    assert mrl.sizes_between((1, 2, 4)) == (3,)
    np.testing.assert_allclose(mrl.interpolated((2, 8), (1.0, 3.0), [1.0, 2.0, 4.0, 8.0, 99.0]), [1, 1, 2, 3, 3])
    with pytest.raises(ValueError, match="sizes must rise"):
        mrl.interpolated((8, 2), (1.0, 3.0), 4.0)
    with pytest.raises(ValueError, match="sizes must rise"):
        mrl.interpolated((2, 8), (1.0,), 4.0)


# ---- retrieval


@pytest.fixture(scope="module")
def golden_lists():
    return np.load(GOLDEN / "retrieval.npz")


@pytest.mark.parametrize("x64", [True, False])
def test_golden_retrieval(golden_lists, x64):
    g = golden_lists
    with jax.enable_x64(x64):
        queries, db = (jnp.asarray(g[name], jnp.float64 if x64 else jnp.float32) for name in ("queries", "db"))
        listed = search(queries, db, k=50, dim=int(g["shortlist_dim"]))
        stages = {
            name: tuple(g[f"funnel_{key}"].tolist()) for name, key in (("dims", "dims"), ("lengths", "shortlists"))
        }
        lists = {
            "shortlist": listed,
            "reranked": rerank(listed, queries, db, dim=int(g["rerank_dim"])),
            "funnel": funnel(listed, queries, db, **stages),
            "full": search(queries, db, k=50),
        }
        for index, (name, found) in enumerate(lists.items()):
            np.testing.assert_array_equal(found, g[f"neighbors_{name}"])
            for k, row in zip(g[f"metrics_{name}_k"], g[f"metrics_{name}"], strict=True):
                measured = measures(found, g["db_labels"], g["query_labels"], k=int(k))
                ours = (measured.map_at_k, measured.precision, measured.precision * k, measured.hit_rate)
                np.testing.assert_allclose(ours, row, rtol=1e-6)  # means in float32
            np.testing.assert_allclose(measured.top1, g["top1"][index], rtol=1e-6)


@pytest.fixture(scope="module")
def search_data():
    rng = np.random.default_rng(3)
    return rng.normal(size=(7, 6)).astype(np.float32), rng.normal(size=(41, 6)).astype(np.float32)


def test_equal_neighbours_are_reranked_by_index():
    rng = np.random.default_rng(4)
    # Coordinates 0 and +-1 with two of them set: equal cosines are equal bits.
    rows = np.zeros((30, 4), np.float32)
    for row in rows:
        row[rng.choice(4, 2, replace=False)] = rng.choice([-1, 1], 2)
    expected = search(rows[:5], rows, k=30)
    scaled = (rows * 2.0 ** rng.integers(-3, 4, size=(30, 1))).astype(np.float32)
    np.testing.assert_array_equal(rerank(rng.permuted(expected, axis=1), rows[:5], scaled, dim=4), expected)


@pytest.mark.parametrize("items", [41, 40])  # padded; even
def test_reranking_over_devices_is_that_of_one(search_data, items):
    queries, database = search_data
    mesh = make_mesh(data=8)
    listed = search(queries, database[:items], k=12, dim=3)
    found = rerank(listed, queries, database[:items], dim=6, mesh=mesh, query_block=4)
    np.testing.assert_array_equal(found, rerank(listed, queries, database[:items], dim=6, query_block=4))
    stages = {"dims": (4, 6), "lengths": (9, 5)}
    found = funnel(listed, queries, database[:items], mesh=mesh, **stages)
    np.testing.assert_array_equal(found, funnel(listed, queries, database[:items], **stages))


@pytest.mark.parametrize("bytes_held", [1, 3 * 20 * 6 * 4, 10**9])  # of one query, of three, of all
def test_reranking_does_not_depend_on_its_blocks(search_data, bytes_held, monkeypatch):
    queries, database = search_data
    listed = search(queries, database, k=20, dim=3)
    monkeypatch.setattr(retrieval, "RERANK_BYTES", bytes_held)
    found = jax.jit(lambda *given: mrl.rerank(*given, 6))(listed, queries, database)
    whole = np.asarray(search(queries, database, k=41))
    expected = [[item for item in row if item in some] for row, some in zip(whole, np.asarray(listed), strict=True)]
    np.testing.assert_array_equal(found, expected)


def test_reranking_holds_few_rows_whatever_their_size():
    shapes = ((1024, 200), jnp.int32), ((1024, 2048), jnp.float32), ((3000, 2048), jnp.float32)  # lists of the paper's
    lowered = rerank.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes), dim=2048)
    assert temporary_bytes(lowered.compile()) < 4 * retrieval.RERANK_BYTES  # all rows: 1.7 GB


@pytest.mark.parametrize("devices", [None, 8])
def test_no_queries_have_no_neighbours(search_data, devices):
    _, database = search_data
    mesh = None if devices is None else make_mesh(data=devices)
    nobody, lists = np.zeros((0, 6), np.float32), np.zeros((0, 9), np.int32)
    assert search(nobody, database, k=9).shape == (0, 9)
    assert rerank(lists, nobody, database, dim=6, mesh=mesh).shape == (0, 9)
    assert funnel(lists, nobody, database, dims=(4, 6), lengths=(5, 2), mesh=mesh).shape == (0, 2)


def test_reranking(search_data):
    queries, database = search_data
    listed = search(queries, database, k=20, dim=3)
    before = np.asarray(listed)
    np.testing.assert_array_equal(rerank(listed, queries, database, dim=3), listed)
    found = rerank(listed, queries, database, dim=6, query_block=2)
    np.testing.assert_array_equal(np.sort(found, axis=1), np.sort(listed, axis=1))
    one_stage = funnel(listed, queries, database, dims=(6,), lengths=(8,))
    np.testing.assert_array_equal(one_stage, rerank(listed[:, :8], queries, database, dim=6))
    everything = search(queries, database, k=41, dim=3)
    expected = search(queries, database, k=41)
    np.testing.assert_array_equal(rerank(everything, queries, database, dim=6), expected)
    thinned = np.asarray(funnel(listed, queries, database, dims=(4, 6), lengths=(15, 5)))
    assert all(set(row) <= set(whole) for row, whole in zip(thinned, before, strict=True))
    np.testing.assert_array_equal(listed, before)


def test_cost_is_the_papers():
    np.testing.assert_allclose(mrl.search_mflops(1_281_167, 2048), 2623.8, atol=0.1)  # "2.6 GFLOPs"
    assert mrl.search_mflops(0, 16, 200, 2048) == 0.4096
    stages = ((32, 64, 128, 256), (100, 50, 25, 10))
    np.testing.assert_allclose(3630 * 256 / 1e6 / mrl.funnel_mflops(3630, 16, *stages), 13.2, atol=0.05)
    np.testing.assert_allclose(3630 * 256 / 1e6 / mrl.search_mflops(3630, 16, 100, 256), 11.1, atol=0.05)


# ---- cascade


@pytest.fixture(scope="module")
def calibrated():
    g = np.load(GOLDEN / "cascade.npz")
    rest = np.setdiff1d(np.arange(1200), g["calibration_index"])
    return (
        g,
        g["calibration_index"],
        rest,
        mrl.learn_thresholds(g["softmax"][:, g["calibration_index"]], g["labels"][g["calibration_index"]]),
    )


def test_golden_cascade(calibrated):
    g, _, rest, thresholds = calibrated
    np.testing.assert_allclose(thresholds, g["thresholds"], atol=1e-6)
    probs, labels = g["softmax"][:, rest], g["labels"][rest]
    for max_exit in range(1, 5):
        found = cascade(probs, thresholds, max_exit=max_exit)
        expected = g["expected_dim"][max_exit - 1]
        np.testing.assert_allclose(mrl.expected_size(found.exit_index, g["dims"].tolist()), expected, rtol=1e-6)
        np.testing.assert_allclose(np.mean(found.prediction == labels), g["accuracy"][max_exit - 1], atol=1e-6)
    np.testing.assert_array_equal(found.exit_index, g["exit_index"])
    cumulative = mrl.expected_size(found.exit_index, g["dims"].tolist(), cumulative=True)
    np.testing.assert_allclose(cumulative, g["expected_dim_cumulative"], rtol=1e-6)
    np.testing.assert_allclose(mrl.oracle_accuracy(g["softmax"], g["labels"]), g["oracle_accuracy"], atol=1e-6)


def test_properties_of_a_cascade(calibrated):
    g, calibration, _, thresholds = calibrated
    probs, labels = g["softmax"], g["labels"]
    grid = mrl.threshold_grid()
    assert (np.abs(np.asarray(thresholds)[:, None] - grid).min(axis=1) < 1e-7).all()
    right = np.argmax(probs, axis=-1)[:, calibration] == labels[calibration]
    sure = probs[:, calibration].max(axis=-1)
    for i, t in enumerate(thresholds):  # t = 1 is the larger head alone
        scores = [np.where(sure[i] > u, right[i], right[i + 1]).mean() for u in grid.astype(np.float32)]
        assert np.where(sure[i] > t, right[i], right[i + 1]).mean() == max(scores) >= right[i + 1].mean()
        assert np.argmax(scores) == np.argmin(np.abs(grid - t))  # the smallest of the best
    first = cascade(probs, thresholds, max_exit=0)
    np.testing.assert_array_equal(first.prediction, np.argmax(probs[0], axis=-1))
    assert (first.exit_index == 0).all()
    results = [cascade(probs, thresholds, max_exit=last) for last in range(5)]
    sizes = [float(mrl.expected_size(found.exit_index, g["dims"].tolist())) for found in results]
    assert sizes == sorted(sizes)
    accuracies = [np.mean(found.prediction == labels) for found in results]
    assert mrl.oracle_accuracy(probs, labels) >= max(accuracies)
    whole = cascade(probs, thresholds)  # all exits
    np.testing.assert_array_equal(whole.prediction, results[-1].prediction)


def test_answers_say_as_much_as_the_probabilities(calibrated):
    g, calibration, _, thresholds = calibrated
    answers = mrl.head_answers(g["softmax"])
    some = mrl.HeadAnswers(*(part[:, calibration] for part in answers))
    np.testing.assert_array_equal(mrl.learn_thresholds(some, g["labels"][calibration]), thresholds)
    for last in range(5):
        reduced, whole = (cascade(given, thresholds, max_exit=last) for given in (answers, g["softmax"]))
        jax.tree.map(np.testing.assert_array_equal, reduced, whole)
    assert mrl.oracle_accuracy(answers, g["labels"]) == mrl.oracle_accuracy(g["softmax"], g["labels"])
    votes = [np.bincount(row).argmax() for row in np.argmax(g["softmax"], axis=-1).T]
    np.testing.assert_array_equal(mrl.majority_vote(answers), votes)
    np.testing.assert_array_equal(mrl.majority_vote(g["softmax"]), votes)


def test_a_head_is_believed_above_its_threshold_not_at_it():
    probs = np.array([[[0.5, 0.5], [0.75, 0.25]], [[0.0, 1.0], [0.0, 1.0]]], np.float32)
    np.testing.assert_array_equal(mrl.cascade(probs, np.array([0.5])).exit_index, [1, 0])
    never = mrl.cascade(np.array([[[1.0, 0.0]], [[0.0, 1.0]]], np.float32), np.array([1.0]))
    np.testing.assert_array_equal(never.prediction, [1])


def test_mirrors_and_votes():
    logits, mirrored = np.array([[1.0, 0, 0]], np.float32), np.array([[0.0, 0, 3]], np.float32)
    expected = np.exp([1, 0, 3]) / np.exp([1, 0, 3]).sum()
    np.testing.assert_allclose(mrl.mirrored_probabilities(logits, mirrored)[0], expected, rtol=1e-6)
    votes = np.eye(4)[np.array([[3, 1, 2], [3, 2, 2], [0, 2, 1]])]
    np.testing.assert_array_equal(mrl.majority_vote(votes), [3, 2, 2])
    np.testing.assert_array_equal(mrl.majority_vote(votes[:2]), [3, 1, 2])  # of equals the lower class


# ---- baselines


def test_svd_is_the_best_head_of_its_rank():
    rng = np.random.default_rng(6)
    W, b, z = rng.normal(size=(5, 9)), rng.normal(size=5), rng.normal(size=(7, 9))
    with jax.enable_x64(True):
        U, S, Vt = np.linalg.svd(W)
        for k in (1, 3, 5):
            head = mrl.svd_head(W.T, b, k)
            expected = z @ (U[:, :k] * S[:k] @ Vt[:k]).T + b
            np.testing.assert_allclose(z @ head.projection @ head.kernel + head.bias, expected, atol=1e-12)
        np.testing.assert_allclose(z @ mrl.svd_head(W.T, b, 5).projection @ head.kernel, z @ W.T, atol=1e-12)
        database = rng.normal(size=(40, 9)) * np.arange(1, 10) + 3
        projection = np.asarray(mrl.svd_projection(database, 4))
        _, _, Vt = np.linalg.svd(database, full_matrices=False)  # not centred
        np.testing.assert_allclose(np.abs(projection.T @ Vt[:4].T), np.eye(4), atol=1e-9)


def test_random_projection_and_features():
    projection = mrl.jl_projection(jax.random.key(0), 64, 16)
    z = np.random.default_rng(7).normal(size=(400, 64)).astype(np.float32)
    ratio = np.sum(np.square(z @ projection), axis=1) / np.sum(np.square(z), axis=1)
    # chi^2 of 16 degrees / 16: deviation 0.35 each; one projection for all, so their mean has about 0.05.
    np.testing.assert_allclose(ratio.mean(), 1, atol=0.2)
    chosen = np.asarray(mrl.random_features(jax.random.key(1), 9, 4))
    assert len(set(chosen.tolist())) == 4
    assert set(chosen.tolist()) <= set(range(9))
    np.testing.assert_array_equal(np.sort(mrl.random_features(jax.random.key(1), 9, 9)), np.arange(9))


def test_linear_probe_finds_the_classes():
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 3, size=150)
    x = (5 + 40 * np.eye(3, 4)[labels] + 4 * rng.normal(size=(150, 4))).astype(np.float32)
    x[:, 3] = 0  # a masked feature
    kernel, bias = jax.jit(lambda x: mrl.linear_probe(x, labels, 3))(x)
    assert (np.argmax(x @ kernel + bias, axis=1) == labels).mean() > 0.99
    assert (np.asarray(kernel)[3] == 0).all()
    # At the end nothing pulls: the gradient with respect to the bias, mean residual, is small.
    p = np.exp(log_softmax(x @ kernel + bias, axis=1))
    np.testing.assert_allclose(p.mean(axis=0), np.bincount(labels) / 150, atol=5e-3)


WIDTHS = (0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def slim():
    model = mrl.SlimmableMLP((8, 12), 16)
    x = np.random.default_rng(9).normal(size=(10, 7)).astype(np.float32)
    return model, jax.jit(lambda key: mrl.init_slimmable(model, WIDTHS, key, x))(jax.random.key(0)), x


def test_a_narrow_network_is_the_first_part_of_the_wide_one(slim):
    model, variables, x = slim
    params, statistics = variables["params"], variables["batch_stats"]
    assert set(statistics) == {f"norm_{i}{end}" for i in (0, 1) for end in ("", "_25", "_50")}
    features = jax.jit(mrl.slimmable_features, static_argnames=("model", "widths", "train"))
    found, changed = features(model, WIDTHS, variables, x, train=True)
    assert [z.shape[1] for z in found] == [4, 8, 16]
    for width, z in zip(WIDTHS, found, strict=True):
        hidden, end = np.float64(x), "" if width == 1 else f"_{100 * width:g}"
        for index, units in enumerate((8, 12, 16)):
            units = int(width * units)
            kernel = np.asarray(params[f"kernel_{index}"])[: hidden.shape[1], :units]
            hidden = hidden @ kernel + np.asarray(params[f"bias_{index}"])[:units]
            if index < 2:
                mean, var = hidden.mean(axis=0), hidden.var(axis=0)
                tracked = changed[f"norm_{index}{end}"]
                np.testing.assert_allclose(tracked["mean"], 0.1 * mean, atol=1e-5)  # PyTorch's momentum 0.1
                np.testing.assert_allclose(tracked["var"], 0.9 + 0.1 * var, atol=1e-5)
                hidden = np.maximum((hidden - mean) / np.sqrt(var + 1e-5), 0)
        np.testing.assert_allclose(z, hidden, atol=1e-4)  # float32
    still, same = features(model, WIDTHS, variables, x)
    jax.tree.map(np.testing.assert_array_equal, same, statistics)
    np.testing.assert_allclose(still[-1], jax.jit(model.apply)(variables, x), atol=1e-6)
    assert np.abs(np.asarray(params["kernel_0"])).max() <= 7**-0.5  # torch.nn.Linear's, of the full network


def test_residual_networks_are_slimmable_too():
    model = ResNet((1,), width=4, stem="small")
    x = jnp.ones((2, 8, 8, 3))
    variables = jax.eval_shape(lambda key: mrl.init_slimmable(model, (0.5, 1.0), key, x), jax.random.key(0))
    assert variables["params"]["stage0_block0"]["conv0"]["kernel"].shape == (3, 3, 4, 4)
    found, _ = jax.eval_shape(lambda v: mrl.slimmable_features(model, (0.5, 1.0), v, x), variables)
    assert [z.shape for z in found] == [(2, 2), (2, 4)]


# ---- refusals

PROBS = np.full((3, 4, 2), 0.5, np.float32)
TWO = np.array([0, 1, 0, 1])
LIST = np.arange(5)[None] % 4
BAD = {
    "unsorted": (lambda: mrl.NestedHead(3, (4, 2, 16)).init(jax.random.key(0), Z), r"nesting must rise strictly"),
    "duplicate": (lambda: mrl.prefix_logits(Z, np.ones((16, 3), np.float32), (4, 4, 16)), r"got \(4, 4, 16\)"),
    "zero": (lambda: mrl.check_nesting((0, 16), 16), r"got \(0, 16\)"),
    "short": (
        lambda: mrl.NestedHead(3, (4, 8), tied=True).init(jax.random.key(0), Z),
        r"to the width 16, got \(4, 8\)",
    ),
    "empty": (lambda: mrl.check_nesting((), 16), r"got \(\)"),
    "fixed": (lambda: mrl.FixedFeatureHead(3, 17).init(jax.random.key(0), Z), "1 to 16 coordinates, not 17"),
    "m_large": (lambda: mrl.truncate(Z, 17), "1 to 16 coordinates, not 17"),
    "m_zero": (lambda: mrl.truncate(Z, 0), "1 to 16 coordinates, not 0"),
    "mask": (lambda: mrl.keep_first(Z, 17), "not 17"),
    "importance_length": (lambda: mrl.nested_cross_entropy(Z[None, :, :5], LABELS, np.ones(2)), "each of the 1 sizes"),
    "importance_sign": (lambda: mrl.nested_cross_entropy(Z[None], LABELS, [-1.0]), r"at least 0, got \[-1.0\]"),
    "labels": (lambda: mrl.nested_cross_entropy(Z[None, :, :4], LABELS), r"labels must be in 0..3, got 4"),
    "smoothing": (lambda: mrl.nested_cross_entropy(Z[None], LABELS, None, 1.5), "label_smoothing must be in"),
    "temperature": (lambda: mrl.nested_contrastive(Z, Z, NESTING, 0.0), "temperature must be above 0"),
    "targets": (lambda: mrl.nested_mlm_loss(Z, Z, np.full(6, 6), NESTING), "0..5, got 6"),
    "state": (lambda: mrl.params_from_torch({"fc.scale": np.ones(3)}), "expected weights and biases, got 'fc.scale'"),
    "layers": (lambda: mrl.params_from_torch({"fc.weight": np.ones((3, 3))}), "expected .'nesting_classifier_0'"),
    "sizes": (lambda: mrl.log_spaced_sizes(4), "smallest must be between 1 and the width 4, got 8"),
    "uniform": (lambda: mrl.uniform_sizes(10, 5, 8), "5 sizes do not fit between 8 and 10"),
    "rerank_axis": (lambda: mrl.rerank(LIST, Z[:1], Z, 8, mesh=make_mesh(data=8), axis="rows"), "not 'rows'"),
    "neighbors": (lambda: mrl.rerank(LIST + 4, Z[:1], Z, 8), "rows of a database of 6: .* got 6"),
    "rerank": (lambda: mrl.rerank(LIST, Z[:1], Z, 17), "not 17"),
    "rerank_block": (lambda: mrl.rerank(LIST, Z[:1], Z, 8, query_block=0), "query_block must be at least 1"),
    "growing": (lambda: mrl.funnel(LIST, Z[:1], Z, (8, 16), (3, 4)), r"lengths must not grow from 5, .* got \(3, 4\)"),
    "too_long": (lambda: mrl.funnel(LIST, Z[:1], Z, (8,), (6,)), r"lengths must not grow from 5"),
    "no_stage": (lambda: mrl.funnel(LIST, Z[:1], Z, (), ()), "as many lengths as dims"),
    "no_rows": (lambda: mrl.funnel(LIST, Z[:1], Z, (8,), (0,)), "at least 1"),
    "funnel_dim": (lambda: mrl.funnel(LIST, Z[:1], Z, (8, 32), (3, 2)), "not 32"),
    "samples": (lambda: mrl.learn_thresholds(PROBS[:, :0], TWO[:0]), "got 0 samples and 3 heads"),
    "one_head": (lambda: mrl.learn_thresholds(PROBS[:1], TWO), "got 4 samples and 1 heads"),
    "logits": (lambda: mrl.learn_thresholds(3 * PROBS, TWO), r"must lie in \[0, 1\], got 0.0 to 1.5"),
    "nan": (lambda: mrl.cascade(np.nan * PROBS, np.ones(2)), "must lie in"),
    "negative": (lambda: mrl.cascade(-PROBS, np.ones(2)), "must lie in"),
    "grid": (lambda: mrl.learn_thresholds(PROBS, TWO, np.array([0.5, 0.4])), "grid must rise"),
    "cascade_labels": (lambda: mrl.learn_thresholds(PROBS, TWO + 1), "0..1, got 2"),
    "oracle_labels": (lambda: mrl.oracle_accuracy(PROBS, TWO - 1), "0..1, got -1"),
    "thresholds": (lambda: mrl.cascade(PROBS, np.ones(3)), "3 heads need 2 thresholds"),
    "answers": (lambda: mrl.head_answers(2.5 * PROBS), "must lie in"),
    "exit": (lambda: mrl.cascade(PROBS, np.ones(2), 3), "max_exit must be between 0 and 2, got 3"),
    "exits": (lambda: mrl.expected_size(np.array([2]), (4, 8)), "0..1, got 2"),
    "rank": (lambda: mrl.svd_head(Z, Z[0], 7), "not 7"),
    "projection": (lambda: mrl.svd_projection(Z, 7), "not 7"),
    "jl": (lambda: mrl.jl_projection(jax.random.key(0), 4, 5), "not 5"),
    "features": (lambda: mrl.random_features(jax.random.key(0), 4, 0), "not 0"),
    "probe": (lambda: mrl.linear_probe(Z, LABELS, 5, num_steps=0), "expected samples, steps and a rate above 0"),
    "width": (lambda: mrl.SlimmableMLP((8,), 16, 0.3).init(jax.random.key(0), Z), "0.3 of 8 is no whole number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()

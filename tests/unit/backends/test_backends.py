"""What every backend promises: same answers, same refusals, no crash on damaged bytes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from vlaopt import backends
from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions, Port, check_feeds, scratch_folder
from vlaopt.errors import EnvironmentProblem, InputError, StageError

ONE_THREAD = EngineOptions(threads=1)
COMPILERS = ["onnxruntime", "openvino"]
RUNNERS = [*COMPILERS, "reference"]
LIBRARIES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "reference": "onnx"}


def opened(name: str, graph: bytes) -> backends.Session:
    backend = backends.get(name)
    return backend.open(backend.build(Graph(graph), ONE_THREAD).files, ONE_THREAD)


def noise(session: backends.Session) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {port.name: rng.standard_normal(port.shape).astype(port.dtype) for port in session.inputs}


@pytest.mark.parametrize("name", COMPILERS)
@pytest.mark.parametrize(("kind", "tolerance"), [("conv", 1e-5), ("lstm", 1e-5), ("int8", 0.02)])
def test_a_backend_agrees_with_the_reference(name, kind, tolerance, graphs):
    reference, session = opened("reference", graphs[kind]), opened(name, graphs[kind])
    feeds = noise(reference)
    expected, got = reference.run(feeds), session.run(feeds)
    assert session.inputs == reference.inputs
    assert session.outputs == reference.outputs
    for port in reference.outputs:
        assert got[port.name].dtype == port.dtype
        assert got[port.name].shape == port.shape
        assert np.abs(got[port.name] - expected[port.name]).max() < tolerance


@pytest.mark.parametrize(("name", "limit"), [("onnxruntime", 127), ("onnxruntime", 64), ("openvino", 64)])
def test_8_bit_products_do_not_saturate_whatever_the_cpu(name, limit, product_of_bytes):
    """OpenVINO's do, on x86 without VNNI, when weights have codes above 64: `Target.reduce_range`."""
    graph = product_of_bytes(limit)
    feeds = {"x": np.random.default_rng(1).uniform(0.5, 1, (8, 512)).astype(np.float32)}
    expected = opened("reference", graph).run(feeds)["y"]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(opened(name, graph).run(feeds)["y"], expected, atol=1e-3)


@pytest.mark.parametrize("name", RUNNERS)
def test_outputs_are_not_overwritten_by_the_next_run(name, graphs):
    session = opened(name, graphs["lstm"])
    feeds = noise(session)
    first = session.run(feeds)["state"]
    kept = first.copy()
    session.run({"sequence": feeds["sequence"] * 2})
    assert np.array_equal(first, kept)


@pytest.mark.parametrize("name", RUNNERS)
def test_a_view_that_is_not_contiguous_gives_the_same_answer(name, graphs):
    session = opened(name, graphs["conv"])
    image = noise(session)["image"]
    view = np.ascontiguousarray(image.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not view.flags.c_contiguous
    assert np.array_equal(session.run({"image": view})["features"], session.run({"image": image})["features"])


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "input 'image' is missing"),
        ({"image": np.zeros((1, 3, 16, 16), np.float32), "extra": np.zeros(1)}, "input 'extra' is not known"),
        ({"image": np.zeros((1, 3, 16, 16))}, "input 'image' has dtype float64, not float32"),
        ({"image": np.zeros((1, 16, 16, 3), np.float32)}, r"input 'image' has shape \(1, 16, 16, 3\), not"),
        ({"image": [[1.0]]}, "input 'image' is a list, not a numpy array"),
    ],
)
def test_wrong_feeds_are_refused_by_name(name, feeds, message, graphs):
    with pytest.raises(InputError, match=message):
        opened(name, graphs["conv"]).run(feeds)


def test_a_dynamic_dimension_takes_any_size_but_zero():
    port = Port("tokens", "float32", (-1, 4))
    check_feeds([port], {"tokens": np.zeros((7, 4), np.float32)})
    with pytest.raises(InputError, match=r"'tokens' has shape \(0, 4\)"):
        check_feeds([port], {"tokens": np.zeros((0, 4), np.float32)})


@pytest.mark.parametrize("name", COMPILERS)
def test_an_output_keeps_its_name_however_odd(name, one_node):
    session = opened(name, one_node("Relu", x="a/b c,\N{ROBOT FACE}", y="out;\N{ROBOT FACE} 1"))
    assert [port.name for port in session.inputs] == ["a/b c,\N{ROBOT FACE}"]
    assert list(session.run(noise(session))) == ["out;\N{ROBOT FACE} 1"]


@pytest.mark.parametrize("name", RUNNERS)
def test_a_graph_cut_anywhere_is_refused_in_one_line(name, graphs):
    graph, backend = graphs["conv"], backends.get(name)
    for percent in (0, 1, 7, 25, 50, 75, 99):
        with pytest.raises(StageError, match="refuses the graph") as caught:
            backend.build(Graph(graph[: len(graph) * percent // 100]), ONE_THREAD)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", RUNNERS)
def test_an_engine_cut_anywhere_is_refused(name, graphs):
    backend = backends.get(name)
    files = backend.build(Graph(graphs["conv"]), ONE_THREAD).files
    largest = max(files, key=lambda file: len(files[file]))
    for percent in (0, 10, 50, 90):
        cut = {**files, largest: files[largest][: len(files[largest]) * percent // 100]}
        with pytest.raises(InputError, match=r"refuses|cannot compile"):
            backend.open(cut, ONE_THREAD)


@pytest.mark.parametrize("name", RUNNERS)
def test_an_engine_with_other_files_is_refused(name):
    with pytest.raises(InputError, match=r"engine is .*not strange\.bin"):
        backends.get(name).open({"strange.bin": b""}, ONE_THREAD)


@pytest.mark.parametrize("name", RUNNERS)
def test_an_unknown_operator_is_named(name, one_node):
    with pytest.raises(StageError, match="Mystery") as caught:
        backends.get(name).build(Graph(one_node("Mystery", domain="maker.example")), ONE_THREAD)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", backends.names())
def test_an_unknown_setting_is_refused(name, graphs):
    with pytest.raises(InputError, match=r"unknown .* setting 'colour'"):
        backends.get(name).build(Graph(graphs["conv"]), EngineOptions(settings={"colour": "red"}))


@pytest.mark.parametrize("name", COMPILERS)
def test_equal_graphs_give_equal_engines(name, graphs):
    backend = backends.get(name)
    for graph in graphs.values():
        assert backend.build(Graph(graph), ONE_THREAD) == backend.build(Graph(graph), ONE_THREAD)


@pytest.mark.parametrize("name", COMPILERS)
def test_negative_threads_are_refused(name, graphs):
    with pytest.raises(InputError, match="threads cannot be negative"):
        backends.get(name).build(Graph(graphs["lstm"]), EngineOptions(threads=-1))


@pytest.mark.parametrize("name", RUNNERS)
def test_an_absent_library_is_reported_with_what_installs_it(name, graphs, monkeypatch):
    backend = backends.get(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    monkeypatch.setitem(sys.modules, LIBRARIES[name], None)
    assert "is not installed: pip install" in backend.missing()
    assert backend.runnable() == backend.missing()
    with pytest.raises(EnvironmentProblem, match="cannot be imported") as caught:
        backend.build(Graph(graphs["conv"]), ONE_THREAD)
    assert caught.value.hint.startswith("pip install 'vlaopt[")


def test_looking_at_backends_imports_none_of_their_libraries():
    program = (
        "import sys; from vlaopt import backends\n"
        "for name in backends.names():\n"
        "    b = backends.get(name); b.runnable(); b.missing() or b.version()\n"
        "heavy = {'onnx', 'onnxruntime', 'openvino', 'torch', 'tensorrt_rtx_bindings'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_folder_for_temporary_files_is_a_problem_of_the_machine(monkeypatch):
    def refuse(prefix: str) -> None:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    with pytest.raises(EnvironmentProblem, match="no temporary folder"), scratch_folder():
        pass


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="unknown backend 'tflite'") as caught:
        backends.get("tflite")
    assert "onnxruntime" in caught.value.hint


def test_the_placements_of_a_target_are_those_of_its_backends_each_once():
    assert backends.placements(["onnxruntime", "reference", "openvino"]) == ["onnxruntime", "openvino"]
    assert backends.placements(["tensorrt", "tensorrt-rtx"]) == ["tensorrt"]
    with pytest.raises(InputError, match="unknown backend 'opnvino'"):
        backends.placements(["opnvino"])

"""The AOTInductor backend: the package equals the graph, at other shapes, in a process without surgeon."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from time import sleep
from typing import Any
from zipfile import ZipFile

import pytest
import torch

import surgeon
from surgeon.backends import _aot_repairs, _aot_weights, aotinductor
from surgeon.backends._aot_lowering import Decomposed, low_bit_kernels
from surgeon.errors import LowerError, RecipeError
from surgeon.graph import Port, assign_tensor
from surgeon.ops import moe_dense, moe_grouped
from surgeon.ports import InputCheck, check_inputs
from surgeon.registry import make_backend
from tests.alone import ALONE
from tests.models import inputs_for, tiny

MOEFIED = {"moefy_ffn": {"experts": 4, "top_k": 2, "router": "centroid"}}
PLAIN = ALONE + """
inputs, expected = torch.load(sys.argv[2], weights_only=True)
(found,) = package(*inputs)
print(json.dumps(float((found - expected).norm() / expected.norm())))
"""


def alone(path: Path, inputs: list[torch.Tensor], expected: torch.Tensor) -> float:
    """Relative error of a package in a fresh process that can import neither surgeon nor transformers."""
    torch.save((inputs, expected), path.with_suffix(".pt"))
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, str(path), str(path.with_suffix(".pt"))], capture_output=True, text=True, cwd=path.parent
    )
    assert run.returncode == 0, run.stderr
    return float(json.loads(run.stdout.splitlines()[-1]))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "passes", "fused", "tolerance"),
    [
        ("mixtral", [], set(), 1e-5),
        ("llama", [{"quantize": {"scheme": "int4", "group": 32, "embeddings": True}}], {"_weight_int4pack_mm_for_cpu"}, 1e-4),
        ("llama", [{"quantize": {"scheme": "int8_dynamic"}}], {"_weight_int8pack_mm"}, 0.25),
        ("gpt2", [MOEFIED, {"quantize": {"scheme": "int8"}}], set(), 1e-4),
        ("mixtral", [{"quantize": {"scheme": "fp8"}}], set(), 1e-4),
    ],
    ids=["experts", "int4", "int8_dynamic", "moefied int8", "fp8"],
)
def test_the_package_equals_the_graph(
    name: str, passes: list[dict[str, Any]], fused: set[str], tolerance: float, tmp_path: Path
) -> None:
    module, inputs = tiny(name, layers=2)
    compiled = surgeon.compile(
        module, passes, inputs=inputs, backend="aotinductor", output=tmp_path / "out", progress=False
    )
    assert compiled.artifact is not None
    assert set(compiled.artifact.details["fused"]) == fused
    loaded = surgeon.load(tmp_path / "out")
    assert compiled.graph is not None
    for batch, length in ((1, 1), (3, 5), (2, 20)):
        call = inputs_for(name, batch, length, padded=False, seed=batch)
        expected = compiled.graph(**call)["logits"].detach()
        assert relative(loaded(**call)["logits"], expected) < tolerance
    turned = {key: value.t().contiguous().t() for key, value in call.items()}  # the same numbers, other strides
    assert relative(loaded(**turned)["logits"], expected) < tolerance
    ordered = [call[port.name] for port in compiled.graph.inputs]
    assert alone(tmp_path / "out" / "model.pt2", ordered, expected) < tolerance
    with pytest.raises(LowerError, match="missing"):
        loaded(input_ids=call["input_ids"])

    manifest = json.loads((tmp_path / "out" / "surgeon.json").read_text())
    manifest["details"]["torch"] = "2.0.0"
    (tmp_path / "out" / "surgeon.json").write_text(json.dumps(manifest))
    with pytest.raises(LowerError, match=r"compiled by torch 2\.0\.0"):
        surgeon.load(tmp_path / "out")


def test_low_bit_kernels_compute_what_the_graph_says() -> None:
    module, inputs = tiny("llama")
    steps = [{"quantize": {"scheme": "int4", "group": 32, "symmetric": False, "embeddings": True}}]
    compiled = surgeon.compile(module, steps, inputs=inputs, backend=None, progress=False)
    assert compiled.graph is not None
    lowered = low_bit_kernels(compiled.graph, "cpu", convert=True)
    assert lowered.kernels["_weight_int4pack_mm_for_cpu"] > 0
    with torch.no_grad():
        expected = compiled.graph(**inputs)["logits"]
        found = Decomposed(lowered.graph, "auto")(*lowered.graph.bind(inputs))[0]
    assert relative(found, expected) < 1e-5
    # no table is dequantized whole: what embeds reads gathered rows
    for node in lowered.graph.module.graph.nodes:
        assert node.target is not torch.ops.aten.embedding.default or node.args[0].op == "get_attr"


@pytest.mark.parametrize("form", ["auto", "gathered", "dense"])
def test_decomposed_experts_equal_the_operator(form: Any) -> None:
    module, inputs = tiny("mixtral")
    graph = surgeon.trace(module, inputs)
    with torch.no_grad():
        found = Decomposed(graph, form)(*graph.bind(inputs))[0]
        expected = graph(**inputs)["logits"]
    assert relative(found, expected) < 1e-5


def test_grouped_experts_equal_dense_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w_in, w_out = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((9, 16), (4, 48, 16), (4, 16, 24))
    )
    index, weight = torch.randint(0, 4, (9, 2), generator=generator), torch.rand(9, 2, generator=generator).bfloat16()
    found, expected = (f(x, index, weight, w_in, w_out, None, None, "silu").float() for f in (moe_grouped, moe_dense))
    assert relative(found, expected) < 2e-2  # bfloat16 has 8 bits


@pytest.mark.slow
def test_what_a_package_says_behind_a_build_names_where_it_lies(tmp_path: Path) -> None:
    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = x + self.down(torch.relu(self.up(x)))
            return y

    compiled = surgeon.compile(
        Residual(), [], inputs={"x": torch.randn(2, 4)}, backend="aotinductor", output=tmp_path / "out", progress=False
    )
    with pytest.raises(LowerError, match=f"^{tmp_path / 'out' / 'model.pt2'}: .* missing: x"):
        compiled()


STATIC = """
import pathlib, sys
import torch
import surgeon
from surgeon.registry import make_backend
module, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()).eval(), torch.randn(2, 4)
artifact = make_backend("aotinductor").lower(surgeon.trace(module, {"input": x}), pathlib.Path(sys.argv[1]))
(found,) = artifact.run({artifact.inputs[0].name: x}).values()
assert torch.allclose(found, module(x), atol=1e-5)
"""


@pytest.mark.slow
def test_a_compiler_that_links_its_library_statically_makes_packages_that_open(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    assert compiler is not None
    static = tmp_path / "g++"
    linking = f'case " $* " in *" -shared "*) exec {compiler} -static-libstdc++ "$@";; esac'
    static.write_text(f'#!/bin/sh\n{linking}\nexec {compiler} "$@"\n')
    static.chmod(0o755)
    environment = {**os.environ, "CXX": str(static), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", STATIC, str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    assert not _aot_repairs._links_shared(str(static))  # so the repair was needed


def test_what_is_known_before_a_run_refuses_as_the_check_does() -> None:
    sizes = {"ids": ("batch", "new"), "mask": ("batch", "past + new"), "past": ("batch", 2, "past")}
    ports = [Port(name, torch.float32, shape) for name, shape in sizes.items()]
    known = InputCheck("here", ports)

    def call(ids: Any = (3, 1), mask: Any = (3, 5), past: Any = (3, 2, 4), **more: Any) -> dict[str, Any]:
        return {"ids": torch.zeros(ids), "mask": torch.zeros(mask), "past": torch.zeros(past), **more}

    fits = call()
    assert known(fits) is fits
    wrong: list[dict[str, Any]] = [
        call(past=(3, 3, 4)), call(ids=(2, 1)), call(mask=(3, 4)), call(ids=(3,)), call(other=torch.zeros(1)),
        {"ids": torch.zeros(3, 1)}, {**fits, "ids": fits["ids"].double()}, {**fits, "mask": [1]},
    ]  # fmt: skip
    for inputs in wrong:
        with pytest.raises(LowerError) as slow:
            check_inputs("here", ports, inputs)
        with pytest.raises(LowerError, match=f"^{re.escape(str(slow.value))}$"):
            known(inputs)


def test_weights_are_held_as_parameters_of_their_own() -> None:
    module, inputs = tiny("llama")
    graph = surgeon.trace(module, inputs).clone()
    name, weight = next((n, p) for n, p in graph.module.named_parameters() if p.dim() == 2)
    wide = torch.zeros(2, *weight.shape)
    wide[1] = weight.detach()
    for place in (name, "alias"):
        assign_tensor(graph.module, place, wide[1])
    aotinductor._hold_as_parameters(graph)
    held = dict(graph.module.named_parameters(remove_duplicate=False))
    assert not list(graph.module.buffers())
    assert held[name] is held["alias"]
    assert torch.equal(held[name], weight)
    assert held[name].untyped_storage().nbytes() == weight.nbytes


def test_weights_do_not_stay_in_the_cache_of_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(aotinductor, "_LARGE", 10)
    folders = []
    for _ in range(2):
        with aotinductor._own_files():
            folders.append(Path(config.aot_inductor.output_path))
            (folders[-1] / "small").write_bytes(b"1")
            (folders[-1] / "large").write_bytes(b"1" * 20)
    assert folders[0] != folders[1]
    assert {path.name for folder in folders for path in folder.iterdir()} == {"small"}
    assert not config.aot_inductor.output_path


def test_weights_follow_the_library_that_was_compiled_without_them(tmp_path: Path) -> None:
    number, page = struct.pack("q", 1234567890123456789), _aot_weights._PAGE
    code = (b"code" + struct.pack("q", 8) + number + b"code").ljust(page)
    other = b"another".ljust(page) + number  # nothing in it says where it ends
    with ZipFile(tmp_path / "before.pt2", "w") as package:
        for name, content in (("model/a.json", b"{}"), ("model/kernel.so", other), ("model/wrapper.so", code + number)):
            package.writestr(name, content)
    weights = [torch.randn(3, 5), torch.arange(7, dtype=torch.int8), torch.empty(0), torch.randn(64).bfloat16()[:2]]
    apart = _aot_weights.Apart(100)
    assert not apart.taken(weights[:1])  # 60 bytes
    assert apart.taken(weights)
    apart.write(tmp_path / "before.pt2", tmp_path / "after.pt2")
    with ZipFile(tmp_path / "after.pt2") as package:
        assert package.testzip() is None
        assert [package.read(name) for name in ("model/a.json", "model/kernel.so")] == [b"{}", other]
        found = package.read("model/wrapper.so")
    whole = [tensor.untyped_storage().tolist() for tensor in weights]
    blob = b"".join(bytes(values).ljust(-(-len(values) // 64) * 64, b"\0") for values in whole)  # 64: as torch reads them
    assert found[page:] == blob + number
    assert found[:page] == code.replace(struct.pack("q", 8) + number, struct.pack("q", len(found) - page) + number)
    with ZipFile(tmp_path / "without.pt2", "w") as package:
        package.writestr("model/kernel.so", other)
    assert [apart.fit(tmp_path / f"{name}.pt2") for name in ("before", "without")] == [True, False]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere torch is imported to find what a library needs")
def test_vector_instructions_are_tried_out_without_importing_torch(tmp_path: Path) -> None:
    from torch._inductor.cpu_vec_isa import VecISA

    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    before = VecISA._avx_py_load
    with _aot_repairs.vectors_found_quickly():
        program = VecISA._avx_py_load + '\nimport sys\nassert "torch" not in sys.modules\n'
    assert VecISA._avx_py_load == before
    found = []
    for path in (library, tmp_path / "missing.so"):
        command = [sys.executable, "-c", program.replace("__lib_path__", str(path))]
        found.append(subprocess.run(command, capture_output=True, check=False, cwd=tmp_path).returncode)
    assert found == [0, 1]


@pytest.mark.slow
def test_large_weights_are_written_into_the_package_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    written: list[int] = []
    write = _aot_weights.Apart.write
    monkeypatch.setattr(_aot_weights.Apart, "write", lambda apart, *paths: written.append(apart.nbytes) or write(apart, *paths))
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(2051, 2049), torch.nn.GELU(), torch.nn.Linear(2049, 16)).eval()
    x = torch.randn(2, 2051)
    (tmp_path / "out").mkdir()
    artifact = make_backend("aotinductor").lower(surgeon.trace(module, {"input": x}), tmp_path / "out")
    nbytes = sum(weight.nbytes for weight in module.parameters())
    assert written == [nbytes + 52 + 60]  # the first two are filled up to multiples of 64
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.pt2"]
    assert max(path.stat().st_size for path in cache.glob("surgeon-*/**/*") if path.is_file()) < nbytes / 4
    with torch.no_grad():
        expected = module(x)
    (found,) = artifact.run({artifact.inputs[0].name: x}).values()
    assert relative(found, expected) < 1e-5
    assert alone(artifact.path, [x], expected) < 1e-5
    with ZipFile(artifact.path) as package:
        assert package.testzip() is None


@pytest.mark.parametrize("fits", [True, False])
def test_a_library_of_another_make_gets_its_weights_from_torch(
    fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aotinductor, "_LARGE", 100)
    if not fits:
        monkeypatch.setattr(_aot_weights, "_with_room", lambda library, count: None)
    torch.manual_seed(0)
    module, x = torch.nn.Linear(33, 17), torch.randn(2, 33)
    artifact = make_backend("aotinductor").lower(surgeon.trace(module, {"input": x}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    (found,) = artifact.run({artifact.inputs[0].name: x}).values()
    with torch.no_grad():
        assert relative(found, module(x)) < 1e-6


def test_a_package_for_cuda_is_opened_for_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy, opened = Lock(), []

    class Opened:
        def __init__(self, *arguments: Any) -> None:
            opened.append(arguments)

        def boxed_run(self, given: list[torch.Tensor]) -> list[torch.Tensor]:
            assert busy.acquire(blocking=False)  # the model would be run by two threads
            sleep(0.01)
            busy.release()
            return [given[0] + 1]

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", Opened)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    port = Port("x", torch.float32, ("n",))
    artifact = aotinductor.AotInductorArtifact(tmp_path, "aotinductor", {"device": "cuda"}, (), (port,), (port,), {})
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: artifact.run({"x": torch.full((2,), float(number))})["x"], range(8)))
    assert [float(each[0]) for each in found] == [float(number + 1) for number in range(8)]
    assert opened == [(str(tmp_path / "model.pt2"), "model", True, 1, -1)]  # "True": without a pool of models


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere torch tries nothing out")
def test_vector_instructions_are_not_tried_out_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import codecache, cpu_vec_isa

    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda *_: pytest.fail("tried out"))
    before = cpu_vec_isa.valid_vec_isa_list
    with _aot_repairs.compilable("cuda"):
        assert cpu_vec_isa.pick_vec_isa() == cpu_vec_isa.invalid_vec_isa
        assert "AOTI_CPU_ISA" not in codecache.get_device_information("cpu")
    assert cpu_vec_isa.valid_vec_isa_list is before


def test_refusals_are_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = tiny("mixtral")
    graph = surgeon.trace(module, inputs)
    refused = {r.node: r.reason for r in make_backend({"aotinductor": {"experts": "grouped"}}).refuses(graph)}
    assert "no grouped matrix multiplication" in refused["experts"]
    if not torch.cuda.is_available():
        assert make_backend({"aotinductor": {"device": "cuda"}}).refuses(graph)[0].node == "device"
    steps = [{"quantize": {"scheme": "int8"}}]
    with pytest.raises(LowerError, match="no low-bit kernel"):
        surgeon.compile(
            module, steps, inputs=inputs, backend={"aotinductor": {"low_bit": "refuse"}}, output=tmp_path / "x", progress=False
        )
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(LowerError, match="C\\+\\+ compiler"):
        surgeon.compile(module, [], inputs=inputs, backend="aotinductor", progress=False)
    with pytest.raises(RecipeError, match="dequantize"):
        make_backend({"aotinductor": {"low_bit": "maybe"}})


def test_branches_name_their_sizes_in_one_list_with_the_graph_around_them() -> None:
    import sympy
    from torch._inductor.graph import GraphLowering, SubgraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    traced, a, b = torch.fx.symbolic_trace(torch.nn.Identity()), sympy.Symbol("s0"), sympy.Symbol("s1")

    def named() -> tuple[sympy.Symbol, sympy.Symbol, sympy.Symbol]:
        around = GraphLowering(traced, shape_env=ShapeEnv())
        with V.set_graph_handler(around):
            branch = SubgraphLowering(around, traced, shape_env=ShapeEnv())
        names = around.sizevars.lookup_precomputed_size(a + b), branch.sizevars.lookup_precomputed_size(a * b)
        return *names, branch.sizevars.lookup_precomputed_size(a + b)

    with _aot_repairs.compilable("cuda"):
        outer, inner, again = named()
    assert outer != inner
    assert outer == again
    outer, inner, _ = named()
    assert outer == inner  # what torch does: once it does not, the repair can go

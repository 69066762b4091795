"""Kernels: which is chosen, that all compute the same, and the layouts of 4-bit weights."""

import logging
import subprocess
import sys

import pytest
import torch
from helpers import random_pictures, tiny_model
from internlm_xcomposer2 import kernels_internlm_xcomposer2 as kernels
from internlm_xcomposer2.build_mlp import PLoRA
from internlm_xcomposer2.cache_internlm_xcomposer2 import origin_of
from internlm_xcomposer2.kernels_internlm_xcomposer2 import Int4Weight, Linear, int4_layout, multiply
from internlm_xcomposer2.packing_internlm_xcomposer2 import Packing, pack_words
from internlm_xcomposer2.quantization_internlm_xcomposer2 import PackedLinear
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

ON_LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="weights are moved where /proc tells their place"
)


def random_product(dtype, rows=(3, 5), inputs=96, outputs=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (*rows, inputs), (outputs, inputs), (outputs,)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


# ---- plain weights ----


@torch.no_grad()
@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(1,), (2, 3), (40,), (0,)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_all_kernels_compute_the_same(monkeypatch, kernel, dtype, rows, with_bias):
    monkeypatch.setenv(kernels.SETTING, kernel)
    x, weight, bias = random_product(dtype, rows)
    bias = bias if with_bias else None
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    found = multiply(x, weight, bias)
    assert found.dtype == dtype and found.shape == expected.shape
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.03}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=limit)


@torch.no_grad()
def test_a_forced_kernel_is_used_where_it_can_be(monkeypatch):
    used = []
    for name, way in kernels.WAYS.items():
        spy = lambda *args, name=name, way=way: used.append(name) or way(*args)  # noqa: E731
        monkeypatch.setitem(kernels.WAYS, name, spy)
    for kernel, dtype, rows in (
        ("onednn", torch.float32, 2),
        ("float32", torch.bfloat16, 40),
        ("rows", torch.float16, 2),
        ("onednn", torch.bfloat16, 40),  # torch's own way, which is oneDNN already
        ("rows", torch.bfloat16, 40),  # too many
    ):
        monkeypatch.setenv(kernels.SETTING, kernel)
        multiply(*random_product(dtype, (rows,)))
    assert [name for name in used if name != "torch"] == ["onednn", "float32", "rows"]


@torch.no_grad()
def test_large_products_are_measured_once_and_the_choice_is_logged(monkeypatch, caplog):
    seconds = {"torch": 3.0, "onednn": 2.0}
    monkeypatch.setattr(kernels, "_seconds", lambda function: seconds[function.__defaults__[0]])
    monkeypatch.delenv(kernels.SETTING, raising=False)
    kernels.measured_kernel.cache_clear()
    caplog.set_level(logging.INFO, kernels.logger.name)
    try:
        large, medium, small = torch.zeros(1024, 1024), torch.zeros(256, 1024), torch.zeros(64, 64)
        assert kernels.choose_kernel(small, 100) == "torch" and kernels.choose_kernel(medium, 63) == "torch"
        assert not caplog.messages
        assert [kernels.choose_kernel(large, 1) for _ in range(3)] == ["onednn"] * 3
        assert [message.split(" (")[0] for message in caplog.messages] == [
            "float32 products of 1 rows are computed by onednn"
        ]
        assert "torch 3000.00 ms, onednn 2000.00 ms" in caplog.messages[0]
        assert kernels.choose_kernel(medium, 64) == "onednn"
        kernels.measured_kernel.cache_clear()
        seconds["torch"] = 2.1  # a close call stays with torch
        assert kernels.choose_kernel(large, 1000) == "torch"
        monkeypatch.setenv(kernels.SETTING, "torch")
        assert kernels.choose_kernel(large, 1) == "torch"
    finally:
        kernels.measured_kernel.cache_clear()


def test_an_unknown_setting_is_rejected(monkeypatch):
    monkeypatch.setenv(kernels.SETTING, "mkl")
    with pytest.raises(ValueError, match="'mkl'; set it to one of auto, torch, onednn"):
        multiply(*(tensor for tensor in random_product(torch.float32)))


def test_what_only_torch_can_compute_is_left_to_it(monkeypatch):
    monkeypatch.setenv(kernels.SETTING, "onednn")
    monkeypatch.setitem(kernels.WAYS, "onednn", lambda *_: pytest.fail("used"))
    linear = Linear(96, 64)
    x = random_product(torch.float32)[0]
    linear(x).sum().backward()  # gradients
    assert linear.weight.grad is not None
    with torch.no_grad():
        assert linear.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu"):
            assert linear.float()(x).dtype == torch.bfloat16
        assert linear.to("meta")(x.to("meta")).device.type == "meta"
        subclass = torch.nn.Parameter(torch.ones(64, 96)).as_subclass(type("Other", (torch.Tensor,), {}))
        assert torch.equal(multiply(torch.ones(1, 96), subclass), torch.full((1, 64), 96.0))


# ---- low-rank weights ----


def random_plora(linear, scaling=0.5, rank=12):
    """A `PLoRA` around this linear."""
    plora = PLoRA(linear.in_features, linear.out_features, lora_r=rank, lora_alpha=scaling * rank).eval()
    torch.manual_seed(1)
    for weight in (plora.Plora_A.weight, plora.Plora_B.weight):
        torch.nn.init.normal_(weight, std=0.1)
    plora.linear = linear
    return plora.requires_grad_(False)


def linears_to_fold_into():
    """A plain linear with a bias, and packed ones of 4 and 8 bits with their inputs in another order."""
    yield Linear(256, 192)
    for bits, groups in ((4, 4), (8, 1)):
        generator = torch.Generator().manual_seed(bits)
        index = torch.arange(256) // (256 // groups)
        packing = Packing("gptq", bits, 256 // groups, 0, ())
        packed = PackedLinear(256, 192, packing, num_groups=groups, has_index=True, has_bias=True)
        integers = torch.randint(0, 2**bits, (192, 256), generator=generator)
        zeros = torch.full((groups, 192), 2 ** (bits - 1))
        packed.qweight.data = pack_words(integers, bits).T.contiguous()
        packed.qzeros.data = pack_words(zeros, bits)
        packed.scales.data = torch.rand(groups, 192, generator=generator) / 2**bits
        packed.bias.data = torch.randn(192, generator=generator)
        packed.g_idx.data = index[torch.randperm(256, generator=generator)].int()
        packed.settle()
        assert packed.settled is not None
        yield packed


def exact_product(x, plora, rows):
    """What a `PLoRA` gives for x (batch, tokens, in), in float64, (rows, out)."""
    rows_of_x, bias = x.double().flatten(0, 1), plora.linear.bias
    output = rows_of_x @ plora.linear.weight.double().T + bias.double()
    low = rows_of_x[rows] @ plora.Plora_A.weight.double().T
    output[rows] += plora.lora_scaling * low @ plora.Plora_B.weight.double().T
    return output


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [slice(0, 140), slice(0, 3), slice(2, 130), slice(139, 140)])
@pytest.mark.parametrize(("setting", "num_parts"), [("torch", 0), ("folded", 3)])
def test_folded_low_rank_weights_give_the_same(monkeypatch, dtype, rows, setting, num_parts):
    parts, add = [], kernels.LowRank.added_to
    monkeypatch.setattr(kernels.LowRank, "added_to", lambda *given: parts.append(given[-1]) or add(*given))
    monkeypatch.setattr(kernels, "_VALUES_AT_ONCE", 64 * 256)  # of a weight of three parts
    monkeypatch.setenv(kernels.SETTING, setting)
    x = torch.randn(2, 70, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
    for linear in linears_to_fold_into():
        plora = random_plora(linear).to(dtype)
        expected, found = exact_product(x, plora, rows), plora(x, image_rows=rows)
        assert (found.shape, found.dtype, len(parts)) == ((2, 70, 192), dtype, num_parts)
        error = (found.double().flatten(0, 1) - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
        parts.clear()


def test_when_low_rank_weights_are_folded(monkeypatch):
    monkeypatch.delenv(kernels.SETTING, raising=False)
    plora = random_plora(Linear(1024, 1024, bias=False))
    low_rank = lambda rows: plora._to_fold(torch.zeros(1, rows, 1024), slice(0, rows))  # noqa: E731
    with torch.no_grad():
        assert low_rank(800) is not None
        assert low_rank(700) is None  # their own products are quicker
        assert random_plora(Linear(96, 96))._to_fold(torch.zeros(1, 800, 96), slice(0, 800)) is None
        monkeypatch.setattr(kernels, "_measured", lambda dtype, rows: "torch")  # a chip with such products
        half = torch.zeros(1, 800, 1024, dtype=torch.bfloat16)
        assert plora.bfloat16()._to_fold(half, slice(0, 800)) is None
        monkeypatch.setattr(kernels, "_measured", lambda dtype, rows: "float32" if rows == 800 else "rows")
        assert plora._to_fold(half, slice(0, 800)) is not None
        assert plora.float().train()._to_fold(torch.zeros(1, 800, 1024), slice(0, 800)) is None
        plora.eval().Plora_A = torch.nn.Sequential(plora.Plora_A)  # as an adapter library wraps it
        assert low_rank(800) is None
        plora.Plora_A = plora.Plora_A[0]
        monkeypatch.setenv(kernels.SETTING, "torch")
        assert low_rank(800) is None
        monkeypatch.setenv(kernels.SETTING, "folded")
        assert low_rank(1) is not None
    plora.requires_grad_()
    assert low_rank(800) is None


# ---- weights of 4 bits ----


def random_int4(outputs=128, inputs=256, groups=4, seed=0, ordered=True):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (outputs, inputs), generator=generator)
    scales = (torch.rand(outputs, groups, generator=generator) * 0.02 + 0.001).half()
    zeros = torch.randint(0, 16, (outputs, groups), generator=generator).to(torch.uint8)
    order = None if ordered else torch.randperm(inputs, generator=generator)
    expected = ((values.float().unflatten(1, (groups, -1)) - zeros[..., None]) * scales[..., None]).flatten(1)
    expected = expected if ordered else expected[:, order.argsort()]
    packed = Int4Weight(kernels.pack_int4(values), scales, zeros, None if ordered else order.int())
    return packed, expected


def test_the_layout_of_this_cpu_is_found():
    layout = int4_layout("cpu")
    assert layout is not None and (layout.rows, layout.cols) in kernels._TILES["cpu"]
    assert int4_layout("mps") is None


@pytest.mark.parametrize("places", [None, "shuffled"])
def test_unpacking_is_the_inverse_of_packing(places):
    """Also for a layout whose tiles are stored in another order than this CPU's."""
    layout = int4_layout("cpu")
    values = torch.randint(0, 16, (192, 64), generator=torch.Generator().manual_seed(0))
    packed = kernels.pack_int4(values)
    assert torch.equal(layout.unpack(packed, 0, 192, 64), values.to(torch.uint8))
    assert torch.equal(layout.unpack(packed, 64, 128, 64), values[64:128].to(torch.uint8))
    if places:
        order = torch.randperm(layout.rows, generator=torch.Generator().manual_seed(1))
        other = kernels.Int4Layout(layout.rows, 1, order)
        expected = values.unflatten(0, (-1, layout.rows))[:, order].flatten(0, 1)
        assert torch.equal(other.unpack(packed, 0, 192, 64), expected.to(torch.uint8))


def test_tiles_of_several_inputs_are_unpacked():
    """The layout of GPUs has tiles of 8 outputs and 128 inputs; here they are laid out by hand."""
    values = torch.randint(0, 16, (16, 256), generator=torch.Generator().manual_seed(0))
    tiles = values.unflatten(0, (2, 8)).unflatten(2, (2, 128)).transpose(1, 2).flatten(2)
    places = torch.randperm(1024, generator=torch.Generator().manual_seed(1))
    nibbles = torch.empty_like(tiles)
    nibbles[..., places] = tiles
    packed = (nibbles[..., :512] | nibbles[..., 512:] << 4).to(torch.uint8)
    layout = kernels.Int4Layout(8, 128, places)
    words = packed.view(2, 2, 32, 16).view(torch.int32)
    assert torch.equal(layout.unpack(words, 0, 16, 256), values.to(torch.uint8))


def test_the_shapes_of_the_cuda_kernel():
    """As far as they can be checked without a GPU: on tensors that have only a shape and a device."""
    with FakeTensorMode():
        packed = kernels.pack_int4(torch.zeros(64, 256, dtype=torch.uint8, device="cuda"))
        assert packed.dtype == torch.int32 and tuple(packed.shape) == (8, 2, 32, 4)
        both = torch.zeros(2, 64, 2, dtype=torch.bfloat16, device="cuda")
        x = torch.zeros(3, 256, dtype=torch.bfloat16, device="cuda")
        product = kernels.multiply_int4(x, packed, 128, both)
    assert tuple(product.shape) == (3, 64) and product.device.type == "cuda"


def test_a_layout_that_is_not_as_expected_is_not_used(monkeypatch):
    """A release that stores the values differently costs speed, not answers."""
    pack = kernels.pack_int4
    monkeypatch.setattr(kernels, "pack_int4", lambda values: pack(values).flip(0))
    int4_layout.cache_clear()
    try:
        assert int4_layout("cpu") is None and not Int4Weight.fits("cpu", 128, 256, 4)
    finally:
        int4_layout.cache_clear()


@pytest.mark.parametrize(
    ("outputs", "inputs", "groups", "fits"),
    [
        (128, 256, 4, True),
        (128, 256, 1, True),
        (128, 96, 1, True),
        (100, 256, 4, False),
        (128, 96, 4, False),
        (128, 100, 3, False),
    ],
)
def test_which_widths_the_kernel_takes(outputs, inputs, groups, fits):
    assert Int4Weight.fits("cpu", outputs, inputs, groups) == fits


@torch.no_grad()
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("setting", ["torch", "float32"])
def test_products_with_4_bit_weights(monkeypatch, ordered, groups, setting):
    monkeypatch.setenv(kernels.SETTING, setting)
    packed, expected = random_int4(groups=groups, ordered=ordered)
    assert torch.equal(packed.unpack(torch.float32), expected)
    assert torch.equal(packed.unpack(torch.bfloat16), expected.bfloat16())
    for rows in (1, 3, kernels.KERNEL_ROWS, kernels.KERNEL_ROWS + 1):
        x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows))
        exact = x @ expected.T
        torch.testing.assert_close(packed(x), exact, rtol=0, atol=1e-5)
        for dtype in (torch.bfloat16, torch.float16):
            found = packed(x.to(dtype)[None])
            assert found.dtype == dtype and found.shape == (1, rows, 128)
            assert (found[0].float() - exact).std() < 0.01 * exact.std()


@torch.no_grad()
def test_large_weights_are_multiplied_in_parts(monkeypatch):
    packed, expected = random_int4(outputs=320)
    monkeypatch.setattr(kernels, "_VALUES_AT_ONCE", 128 * 256)
    monkeypatch.setattr(kernels, "_IN_CACHE", 64 * 256)
    x = torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed(x), x @ expected.T, rtol=0, atol=1e-5)
    assert torch.equal(packed.unpack(torch.bfloat16), expected.bfloat16())


def test_memory_of_a_4_bit_weight():
    packed, expected = random_int4(outputs=512, inputs=1024, groups=8)
    assert sum(buffer.nbytes for buffer in packed.buffers()) < 0.3 * 2 * expected.numel()


# ---- parts of the tower ----


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quick_gelu_in_parts_is_exact(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "_IN_CACHE", 64)
    x = torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = x * torch.sigmoid(1.702 * x)
    assert torch.equal(kernels.QuickGelu()(x.transpose(0, 1).clone().transpose(0, 1)), expected)
    assert torch.equal(kernels.QuickGelu()(x.clone()), expected)


def test_quick_gelu_has_gradients_and_keeps_its_input_for_them():
    x = torch.randn(5, requires_grad=True)
    before = x.detach().clone()
    kernels.QuickGelu()(x).sum().backward()
    expected = before.clone().requires_grad_()
    (expected * torch.sigmoid(1.702 * expected)).sum().backward()
    assert torch.equal(x.grad, expected.grad) and torch.equal(x.detach(), before)


def test_a_librarys_module_gets_the_kernels():
    model = tiny_model("2.5")
    tower = [module for module in model.vit.modules() if isinstance(module, torch.nn.Linear)]
    assert tower and all(isinstance(module, Linear) for module in tower)
    assert sum(isinstance(module, kernels.QuickGelu) for module in model.vit.modules()) == 2
    every = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(isinstance(module, Linear) for module in every)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2, bias=False))
    weights = [module.weight for module in plain]
    names = list(plain.state_dict())
    assert kernels.with_kernels(plain) is plain and list(plain.state_dict()) == names
    assert all(module.weight is weight for module, weight in zip(plain, weights, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_computes_the_same_with_all_kernels(monkeypatch, kernel, dtype):
    model = tiny_model("2.5", task_adapters={"sft": 3, "dpo": 2, "web": 5}).to(getattr(torch, dtype))
    pixel_values, grids = random_pictures(model, [(1, 1)])
    places = [model.config.image_token_id] * model.num_image_tokens(1, 1)
    inputs = {"pixel_values": pixel_values, "image_grid_hw": grids}
    ids = torch.tensor([[1, *places, 60, 70, 80]])
    monkeypatch.setenv(kernels.SETTING, "torch")
    expected = model(ids, **inputs, infer_mode="write").logits
    monkeypatch.setenv(kernels.SETTING, kernel)
    limit = 1e-5 if dtype == "float32" else 0.1
    torch.testing.assert_close(model(ids, **inputs, infer_mode="write").logits, expected, rtol=0, atol=limit)


# ---- where weights lie ----


def mapped_linear(folder, values=None):
    """A linear whose weight is mapped from a file, and the file."""
    values = torch.arange(96 * 64, dtype=torch.float32).view(96, 64) if values is None else values
    save_file({"weight": values}, folder / "weight.safetensors")
    linear = Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(load_file(folder / "weight.safetensors")["weight"])
    return linear, folder / "weight.safetensors"


def is_mapped(weight) -> bool:
    places = kernels._mapped_files()
    return any(start <= weight.data_ptr() < stop for start, stop, *_ in places)


@pytest.fixture
def all_are_large(monkeypatch):
    monkeypatch.setattr(kernels, "LARGE", 1)
    monkeypatch.setattr(kernels, "_NARROW", 0)
    monkeypatch.delenv(kernels.SETTING, raising=False)


@ON_LINUX
def test_mapped_weights_move_into_memory(tmp_path, all_are_large):
    linear, _ = mapped_linear(tmp_path)
    weight, before = linear.weight, linear.weight.detach().clone()
    assert is_mapped(weight)
    assert kernels.own_memory(linear) == weight.nbytes and not is_mapped(weight)
    assert linear.weight is weight and torch.equal(weight, before)
    assert kernels.own_memory(linear) == 0
    with torch.no_grad():
        weight += 1
    assert torch.equal(weight, before + 1)


@ON_LINUX
@pytest.mark.parametrize("reason", ["no room", "torch", "changed", "narrow", "small"])
def test_which_weights_stay_mapped(tmp_path, all_are_large, monkeypatch, reason):
    linear, _ = mapped_linear(tmp_path)
    if reason == "no room":
        monkeypatch.setattr(kernels, "free_memory", lambda: linear.weight.nbytes)
    elif reason == "torch":
        monkeypatch.setenv(kernels.SETTING, "torch")
    elif reason == "changed":  # the file has other numbers
        with torch.no_grad():
            linear.weight.mul_(2)
    else:
        monkeypatch.setattr(kernels, {"narrow": "_NARROW", "small": "LARGE"}[reason], 64 * 96 + 1)
    expected = linear.weight.detach().clone()
    assert kernels.own_memory(linear) == 0
    assert is_mapped(linear.weight) and torch.equal(linear.weight, expected)


@ON_LINUX
def test_a_file_that_shrinks_is_an_error(tmp_path, all_are_large):
    linear, path = mapped_linear(tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(OSError, match="1920 of 24576 bytes of a tensor"):
        kernels.own_memory(linear)


@ON_LINUX
def test_the_first_answer_moves_what_decoding_reads(tmp_path, all_are_large):
    saved = tiny_model("2.5")
    saved.save_pretrained(tmp_path)
    model = type(saved).from_pretrained(tmp_path).requires_grad_(True)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    before = origin_of(model, "base")
    assert linears and all(is_mapped(module.weight) for module in linears)
    with torch.inference_mode():
        model.generate(torch.tensor([[1, 60, 70]]), max_new_tokens=2, min_new_tokens=2)
    assert not any(is_mapped(module.weight) for module in linears) and not model.may_be_mapped
    for name, weight in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert origin_of(model, "base") == before  # what has been computed with the weights still holds
    model(torch.tensor([[1, 60, 70]])).logits.sum().backward()
    assert model.output.weight.grad is not None and not model.output.weight.is_inference()


MEASURED = """
import sys, torch
from internlm_xcomposer2.kernels_internlm_xcomposer2 import Linear, own_memory
from safetensors.torch import load_file

def resident(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(lines[name].split()[0])

model = torch.nn.Sequential(*(Linear(2048, 4096, bias=False, device="meta") for _ in range(8)))
before = resident("VmHWM")
model.load_state_dict(load_file(sys.argv[1]), assign=True)
print(own_memory(model), resident("VmHWM") - before)
"""


@ON_LINUX
@pytest.mark.slow
def test_memory_never_holds_weights_twice(tmp_path):
    weights = {f"{index}.weight": torch.full((4096, 2048), float(index)) for index in range(8)}
    save_file(weights, tmp_path / "weights.safetensors")
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "weights.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    moved, grown = map(int, result.stdout.split())
    assert moved == 8 * 4096 * 2048 * 4 and moved <= grown < 1.2 * moved


@ON_LINUX
def test_free_memory_ends_at_the_limit_of_the_control_group(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_CGROUP", tmp_path)
    whole = kernels.free_memory()  # no control group
    assert whole > 1 << 20
    for name, text in {"max": "3000", "current": "2500", "stat": "anon 7\ninactive_file 400\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert kernels.free_memory() == 900
    (tmp_path / "memory.max").write_text("max\n")
    assert kernels.free_memory() > 1 << 20

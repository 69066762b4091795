"""How a product with a weight is computed on this machine, plain weights and those of few bits.

The ways differ in rounding only. The environment variable `INTERNLM_XCOMPOSER2_KERNELS` names one of
`KERNELS`: `auto` (the default) measures large products once per process, `torch` leaves everything to torch,
`folded` adds low-rank weights to the weight for any number of rows, the others are taken for products of
every size wherever they can compute them.
"""

import ctypes
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import starmap
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation
from transformers.utils import logging

logger = logging.get_logger(__name__)

SETTING = "INTERNLM_XCOMPOSER2_KERNELS"
KERNELS = ("auto", "torch", "onednn", "float32", "rows", "folded")

LARGE = 1 << 20  # values of a weight from which the choice of a kernel matters
_LARGE_FOR_MANY = 1 << 18  # the same for many rows
FEW_ROWS, _MANY_ROWS = 8, 64
# Rows that are measured, and the (out, in) of the weight: of a decoding step, of beams, of a prompt.
_MEASURED = {1: (2048, 4096), 4: (2048, 4096), 256: (1024, 2048)}
_REPEATS = 3
_MARGIN = 1.1  # how many times as fast another way must be: close calls stay with torch, so that runs agree
_VALUES_AT_ONCE = 1 << 21  # weights that are converted or unpacked at once: what a core's cache holds
_IN_CACHE = 1 << 18  # values that pass through several steps at once
_HALF_TYPES = (torch.bfloat16, torch.float16)
_FOLDING = 1.5  # times its products by which low-rank weights must save any to be folded


# ---- plain weights ----


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _by_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Half types by way of float32, a part of the weight at a time: for chips without half-type products."""
    return product_by_parts(x.float(), len(weight), lambda part: weight[part].float(), x.dtype, bias)


def _by_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row at a time, as a matrix times a vector."""
    outputs = torch.stack([weight.mv(row) for row in x])
    return outputs if bias is None else outputs.add_(bias)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "torch": _by_torch,
    "onednn": _by_onednn,
    "float32": _by_float32,
    "rows": _by_rows,
}


@cache
def _onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this type on this chip."""
    x = torch.ones(1, 64, dtype=dtype)
    try:
        return torch.backends.mkldnn.is_available() and _by_onednn(x, x, None).item() == 64
    except (AttributeError, RuntimeError):  # the build, or the chip, has no such product
        return False


def possible_kernels(dtype: torch.dtype, num_rows: int) -> list[str]:
    """The ways that can compute a product of this type on a CPU, and aren't certainly slow."""
    ways = ["torch"]
    if _onednn_takes(dtype) and (dtype == torch.float32 or num_rows <= FEW_ROWS):
        ways.append("onednn")  # torch's own way for many rows of half types
    if dtype in _HALF_TYPES:
        ways.append("rows" if num_rows <= FEW_ROWS else "float32")
    return ways


def setting() -> str:
    """Which of `KERNELS` the environment names.

    Raises:
        ValueError: it names none of them.
    """
    name = os.environ.get(SETTING, "auto")
    if name not in KERNELS:
        raise ValueError(f"{SETTING} is {name!r}; set it to one of {', '.join(KERNELS)}")
    return name


def choose_kernel(weight: Tensor, num_rows: int) -> str:
    """The way in which `num_rows` rows are multiplied with a weight (out, in) on a CPU."""
    name, least = setting(), _LARGE_FOR_MANY if num_rows >= _MANY_ROWS else LARGE
    if num_rows == 0 or (name == "auto" and weight.numel() < least):
        return "torch"
    if name == "auto":
        return _measured(weight.dtype, num_rows)
    return name if name in possible_kernels(weight.dtype, num_rows) else "torch"


def _measured(dtype: torch.dtype, num_rows: int) -> str:
    """The quickest way for this many rows, as measured with a similar number."""
    rows = next((rows for rows in _MEASURED if num_rows <= 2 * rows), max(_MEASURED))
    return measured_kernel(dtype, rows, torch.get_num_threads())


@cache
def measured_kernel(dtype: torch.dtype, num_rows: int, num_threads: int) -> str:
    """The way that is quickest here by a clear margin, measured once per process in tenths of a second."""
    ways = possible_kernels(dtype, num_rows)
    if len(ways) == 1:
        return ways[0]
    outputs, inputs = _MEASURED[num_rows]
    weight = torch.full((outputs, inputs), 0.5, dtype=dtype)
    x = torch.full((num_rows, inputs), 0.5, dtype=dtype)
    with torch.no_grad():
        seconds = {way: _seconds(lambda way=way: WAYS[way](x, weight, None)) for way in ways}
    best = min(seconds, key=seconds.get)
    chosen = best if seconds["torch"] > _MARGIN * seconds[best] else "torch"
    kind = str(dtype).removeprefix("torch.")
    times = ", ".join(f"{way} {1000 * time:.2f} ms" for way, time in seconds.items())
    logger.info(
        f"{kind} products of {num_rows} rows are computed by {chosen} ({times}, {num_threads} threads); "
        f"set {SETTING}=torch to leave them to torch"
    )
    return chosen


def _seconds(function: Callable[[], object]) -> float:
    """The shortest of several calls, after one that is not counted."""
    times = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` in the quickest way: (..., in), (out, in), (out,) -> (..., out).

    Anything but plain tensors of one type on a CPU, without gradients, is left to torch.
    """
    if not _is_plain_product(x, weight, bias):
        return nn.functional.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    way = choose_kernel(weight, len(flat))
    if way == "torch":
        return nn.functional.linear(x, weight, bias)
    return WAYS[way](flat.contiguous(), weight, bias).view(*x.shape[:-1], len(weight))


def _is_plain_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and type(weight) in (nn.Parameter, Tensor)
        and type(x) is Tensor
        and x.dtype == weight.dtype
        and weight.device == x.device
        and weight.is_contiguous()
        and not needs_gradient(x, weight, bias)
        and not torch.is_autocast_enabled("cpu")
    )


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from any of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def add_product(output: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`output + x W^T` in place, without gradients: (rows, out), (rows, in), (out, in) -> (rows, out)."""
    if _is_plain_product(x, weight, None) and choose_kernel(weight, len(x)) != "torch":
        return output.add_(multiply(x, weight))
    return output.addmm_(x, weight.t())


# ---- low-rank weights ----


@dataclass(frozen=True)
class LowRank:
    """`scaling * up down`, to be added to a weight (out, in) for some of the rows that it is multiplied with.

    Attributes:
        up: (out, rank).
        down: (rank, in).
        rows: which of all rows.
    """

    up: Tensor
    down: Tensor
    scaling: float
    rows: slice

    def folds(self, x: Tensor) -> bool:
        """Whether to add them to the weight, rather than their product with x (..., in) to the output.

        That takes fewer operations if the rows are many: `rank * out * in` instead of
        `rows * rank * (out + in)`. It is done where sums are in float32, so that nothing is rounded off.
        """
        outputs, inputs = len(self.up), self.down.shape[1]
        saved = (self.rows.stop - self.rows.start) * (outputs + inputs)
        pays = outputs * inputs >= LARGE and saved > _FOLDING * outputs * inputs
        return (
            (setting() == "folded" or (pays and setting() != "torch"))
            and all(_is_plain_product(x, weight, None) for weight in (self.up, self.down))
            and _type_of_large_products(x.flatten(0, -2)) == torch.float32
        )

    def added_to(self, weight: Tensor, part: slice) -> Tensor:
        """Some outputs of the weight, float32 -> the same of the sum."""
        return torch.addmm(weight, self.up[part].float(), self.down.float(), alpha=self.scaling)


def product_by_parts(
    rows: Tensor,
    num_outputs: int,
    part_of: Callable[[slice], Tensor],
    dtype: torch.dtype,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
) -> Tensor:
    """(rows, in) times a weight that is made a part at a time -> (rows, out) of `dtype`.

    Args:
        part_of: some outputs of the weight, (outputs, in) of the type of the rows.
        low_rank: what to add to the weight for some rows.
    """
    output = rows.new_empty(len(rows), num_outputs, dtype=dtype)
    for part in starmap(slice, _steps(num_outputs, _VALUES_AT_ONCE // rows.shape[1])):
        weights = [(slice(None), part_of(part))]
        if low_rank is not None:
            before, after = slice(low_rank.rows.start), slice(low_rank.rows.stop, None)
            summed = low_rank.added_to(weights[0][1], part)
            weights = [(before, weights[0][1]), (low_rank.rows, summed), (after, weights[0][1])]
        for which, weight in weights:
            _multiply_into(output[which, part], rows[which], weight, None if bias is None else bias[part])
    return output


def _multiply_into(output: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Write `rows weight^T + bias` into a view of the output, without a copy where torch computes it."""
    bias = None if bias is None else bias.to(rows.dtype)
    if output.dtype != rows.dtype or choose_kernel(weight, len(rows)) != "torch":
        output.copy_(multiply(rows, weight, bias))
    elif bias is None:
        torch.mm(rows, weight.t(), out=output)
    else:
        torch.addmm(bias, rows, weight.t(), out=output)


class Linear(nn.Linear):
    """torch's linear, computed by `multiply`."""

    def folds(self, x: Tensor, low_rank: LowRank) -> bool:
        """Whether these low-rank weights are better folded into this one for x (..., in)."""
        return low_rank.folds(x) and _is_plain_product(x, self.weight, self.bias)

    def forward(self, x: Tensor, low_rank: LowRank | None = None) -> Tensor:
        """(..., in) -> (..., out).

        Args:
            low_rank: to be folded in for some of the rows of all batches, where `folds` says that it can be.
        """
        if low_rank is None:
            return multiply(x, self.weight, self.bias)
        rows, outputs = x.reshape(-1, x.shape[-1]).float(), self.out_features
        output = product_by_parts(
            rows, outputs, lambda part: self.weight[part].float(), x.dtype, self.bias, low_rank
        )
        return output.view(*x.shape[:-1], outputs)


class QuickGelu(nn.Module):
    """`x * sigmoid(1.702 x)`, CLIP's activation; without gradients in place, a part at a time.

    A part passes through all steps while it is in a core's cache, so that memory is read and written once.
    """

    def forward(self, x: Tensor) -> Tensor:
        """A tensor of any shape -> the same shape."""
        x = x.contiguous()
        if torch.compiler.is_compiling() or x.device.type != "cpu" or needs_gradient(x):
            return x * torch.sigmoid(1.702 * x)
        for part in x.view(-1).split(_IN_CACHE * torch.get_num_threads()):
            part.mul_(torch.mul(part, 1.702).sigmoid_())
        return x


def with_kernels(module: nn.Module) -> nn.Module:
    """A library's module whose plain linears and `quick_gelu` are computed by the ones here."""
    for name, child in list(module.named_modules()):
        if type(child) is nn.Linear:
            linear = Linear(child.in_features, child.out_features, child.bias is not None, device="meta")
            linear.weight, linear.bias = child.weight, child.bias
            module.set_submodule(name, linear)
        elif isinstance(child, QuickGELUActivation):
            module.set_submodule(name, QuickGelu())
    return module


# ---- where weights lie ----

_NARROW = 512  # inputs or outputs of low-rank weights, which a decoding step doesn't read
_ROOM = 1.25  # times the weights' size that must be free
_CGROUP = Path("/sys/fs/cgroup")


def own_memory(model: nn.Module) -> int:
    """Move the large weights of linears out of the file that they are mapped from -> bytes moved.

    A decoding step reads all of them, which is a few percent quicker from the process's own memory. One at a
    time is read from the file, past the mapping, so that none is held twice. Weights stay mapped without
    `/proc`, without room, and if everything is left to torch. No huge pages are requested: on a machine whose
    memory is full of files, the system takes seconds to make them.
    """
    mapped = _mapped_files() if setting() != "torch" else []
    linears = (module.weight for module in model.modules() if isinstance(module, nn.Linear))
    places = [(weight, place) for weight in linears if (place := _place_in_file(weight, mapped))]
    size = sum(weight.nbytes for weight, _ in places)
    if not size or _ROOM * size > free_memory():
        return 0
    for weight, (path, offset) in places:
        weight.data = _read_tensor(path, offset, weight)
    return size


def _mapped_files() -> list[tuple[int, int, int, str]]:
    """Start and stop of each mapping of a file in this process, and what of the file it begins with."""
    maps, found = Path("/proc/self/maps"), []
    for line in maps.read_text().splitlines() if maps.exists() else ():
        addresses, _, offset, _, _, *name = line.split(maxsplit=5)
        if name and name[0].startswith("/") and not name[0].endswith(" (deleted)"):
            start, stop = (int(address, 16) for address in addresses.split("-"))
            found.append((start, stop, int(offset, 16), name[0]))
    return found


def _place_in_file(weight: Tensor, mapped: list[tuple[int, int, int, str]]) -> tuple[str, int] | None:
    """File and offset of a large plain weight that is mapped and unchanged."""
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    if weight.numel() < LARGE or min(weight.shape) <= _NARROW or weight._version:
        return None
    first, last = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    for start, stop, offset, path in mapped:
        if start <= first < last <= stop:
            return path, offset + first - start
    return None


def _read_tensor(path: str, offset: int, like: Tensor) -> Tensor:
    """A tensor of a file, in new memory.

    Raises:
        OSError: the file can't be read, or no longer holds the tensor.
    """
    with torch.inference_mode(False):  # a weight may have to train later
        tensor = torch.empty(like.shape, dtype=like.dtype)
    with open(path, "rb") as file:
        file.seek(offset)
        num_read = file.readinto(tensor.view(-1).view(torch.uint8).numpy())
    if num_read < like.nbytes:
        raise OSError(
            f"{path} has {num_read} of {like.nbytes} bytes of a tensor; it changed since it was loaded"
        )
    return tensor


def release_freed_memory() -> None:
    """Give the system back what the C library keeps of freed memory, if it is one that can be told to."""
    with suppress(AttributeError, OSError, TypeError):  # it has no such function
        ctypes.CDLL(None).malloc_trim(0)


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group's limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0])
    with suppress(OSError, ValueError, KeyError):  # no control group, or none with a limit ("max")
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        free = min(free, limit - used + int(dict(line.split() for line in lines)["inactive_file"]))
    return free


# ---- weights of few bits ----

INT8_ZERO = 128
INT4_GROUPS = (256, 128, 64, 32)  # inputs with a common scale and zero point that the kernels take
KERNEL_ROWS = 128  # up to so many rows the kernels are quicker than unpacking the weight
_INNER_TILES = 8  # of 16 inputs each, in CUDA's layout
# (outputs, inputs) of a tile of the packed weight, to be tried
_TILES = {"cpu": ((64, 1), (32, 1), (16, 1)), "cuda": ((8, 16 * _INNER_TILES),)}
_MOST_OUTPUTS = 64  # of a tile: parts of a weight begin at multiples of it


@dataclass(frozen=True)
class Int4Layout:
    """Where the 4-bit kernel of a kind of device expects each value of a weight.

    A weight (out, in) consists of tiles of `rows` outputs and `cols` inputs, which are stored row by row of
    tiles. `places` says for each value of a tile which of its nibbles holds it, all the low ones of its bytes
    counted before all the high ones; `None` if that is their order already.
    """

    rows: int
    cols: int
    places: Tensor | None

    def unpack(self, packed: Tensor, start: int, stop: int, inputs: int) -> Tensor:
        """Outputs `start` to `stop`, multiples of `rows`, of a packed weight -> (outputs, in), uint8."""
        across = inputs // self.cols
        tiles = packed.view(torch.uint8).view(-1, across, self.rows * self.cols // 2)
        tiles = tiles[start // self.rows : stop // self.rows].transpose(1, 2).contiguous()
        values = torch.cat([tiles & 15, tiles >> 4], dim=1)  # (rows of tiles, values of a tile, across)
        if self.places is not None:
            values = values.index_select(1, self.places.to(values.device))
        values = values.unflatten(1, (self.rows, self.cols)).transpose(2, 3)
        return values.reshape(stop - start, inputs)


@cache
def int4_layout(device_type: str) -> Int4Layout | None:
    """The layout of this kind of device, found out by packing numbered values; `None` without a kernel.

    The layouts are not documented, and differ between the instruction sets of CPUs.
    """
    if device_type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return None
    for rows, cols in _TILES.get(device_type, ()):
        layout = _layout_of_tiles(device_type, rows, cols)
        if layout is not None and _is_right(layout, device_type):
            return layout
    return None


def _layout_of_tiles(device_type: str, rows: int, cols: int) -> Int4Layout | None:
    """The layout if its tiles have this size, from the digits of numbered values; `None` if they don't."""
    numbers = torch.arange(rows * cols, device=device_type).view(rows, cols)
    columns = numbers if cols > 1 else numbers.expand(rows, max(INT4_GROUPS))
    found = torch.zeros(rows * cols, dtype=torch.long, device=device_type)
    for shift in (0, 4, 8):
        tile = pack_int4(columns >> shift & 15).view(torch.uint8).flatten()[: rows * cols // 2].long()
        found |= torch.cat([tile & 15, tile >> 4]) << shift
    places = found.argsort().cpu()
    if not torch.equal(found.sort().values, numbers.flatten()):
        return None
    in_order = torch.equal(places, torch.arange(rows * cols))
    return Int4Layout(rows, cols, None if in_order else places)


def _is_right(layout: Int4Layout, device_type: str) -> bool:
    """Whether a weight of several tiles is unpacked to what was packed."""
    shape = 2 * max(layout.rows, 16), 2 * max(layout.cols, max(INT4_GROUPS))
    values = torch.arange(shape[0] * shape[1]).mul(7919).div(13, rounding_mode="floor").view(shape) & 15
    values = values.to(device_type)
    return torch.equal(layout.unpack(pack_int4(values), 0, *shape), values.to(torch.uint8))


def pack_int4(values: Tensor) -> Tensor:
    """(out, in) integers from 0 to 15 -> what the kernel of their device reads."""
    if values.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int().contiguous(), 1)
    high, low = values.to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return torch.ops.aten._convert_weight_to_int4pack(high << 4 | low, _INNER_TILES)


def multiply_int4(x: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
    """`x W^T` in bfloat16, where `W = (values - 8) * scale + zero`.

    Args:
        x: (rows, in), bfloat16.
        packed: what `pack_int4` returned on this device.
        group_size: one of `INT4_GROUPS`.
        scales_and_zeros: (in / group_size, out, 2), bfloat16.

    Returns:
        (rows, out), bfloat16.
    """
    on_cpu = x.device.type == "cpu"
    product = torch.ops.aten._weight_int4pack_mm_for_cpu if on_cpu else torch.ops.aten._weight_int4pack_mm
    return product(x.contiguous(), packed, group_size, scales_and_zeros)


class KeepsTypes(nn.Module):
    """A module whose tensors `half()`, `to(dtype)` and their like move, but never convert."""

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Like the base class, except for the types."""

        def keep_type(tensor: Tensor) -> Tensor:
            moved = function(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_type, recurse)


class PackedWeight(KeepsTypes):
    """A weight (out, in) of few bits: `(integer - zero) * scale`, in the order of its device's kernel.

    In bfloat16 and float16, few rows are multiplied by the kernel, in bfloat16 with scales of that type. For
    many rows, and always in float32, a part of the weight at a time is unpacked exactly.

    Args:
        codes: the integers as the kernel reads them, with the inputs of each group side by side.
        scales: (out, groups), of a type that holds them exactly.
        zeros: (out, groups), uint8.
        order: (in,) inputs in the order in which `codes` has them; `None` if that is their own.
    """

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None = None) -> None:
        super().__init__()
        self.layout = codes.device.type  # of the device that `codes` were packed for
        self.out_features, self.num_groups = scales.shape
        self.in_features = codes.nbytes * 8 // self.bits // self.out_features
        for name, value in {"codes": codes, "scales": scales, "zeros": zeros, "order": order}.items():
            self.register_buffer(name, value, persistent=False)

    def integers(self) -> Tensor:
        """(out, in), uint8."""
        return self._reordered(self._ordered(0, self.out_features))

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """(out, in), exact in float32."""
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.codes.device)
        return self._reordered(self._unpack_into(weight, 0))

    def _reordered(self, values: Tensor) -> Tensor:
        """(outputs, in) with the inputs in their own order."""
        return values if self.order is None else values.index_select(1, self.order.argsort())

    def _unpack_into(self, weight: Tensor, start: int) -> Tensor:
        """Fill (outputs, in) with the weights from output `start` on, the inputs of each group together."""
        scales, zeros = (t[start : start + len(weight)].float()[..., None] for t in (self.scales, self.zeros))
        is_float = weight.dtype == torch.float32
        steps = _steps(len(weight), _IN_CACHE // self.in_features)
        block = None if is_float else torch.empty_like(weight[slice(*steps[0])], dtype=torch.float32)
        for first, last in steps:
            values = weight[first:last] if is_float else block[: last - first]
            values.copy_(self._ordered(start + first, start + last))
            groups = values.unflatten(1, (self.num_groups, -1))
            groups.sub_(zeros[first:last]).mul_(scales[first:last])
            if not is_float:
                weight[first:last] = values
        return weight

    def forward(self, x: Tensor, low_rank: LowRank | None = None) -> Tensor:
        """(..., in) -> (..., out), without gradients, with low-rank weights folded in for some rows."""
        rows = x.reshape(-1, self.in_features)
        few = len(rows) <= KERNEL_ROWS and low_rank is None
        if self.layout == x.device.type and few and x.dtype in _HALF_TYPES:
            rows = rows if self.order is None else rows.index_select(1, self.order)
            output = self._by_kernel(rows.to(torch.bfloat16).contiguous()).to(x.dtype)
        else:
            output = self._by_parts(rows.to(_type_of_large_products(rows)), x.dtype, low_rank)
        return output.view(*x.shape[:-1], -1)

    def _by_parts(self, rows: Tensor, dtype: torch.dtype, low_rank: LowRank | None) -> Tensor:
        """(rows, in) -> (rows, out) of `dtype`, a part of the weight at a time."""
        _, most = _steps(self.out_features, _VALUES_AT_ONCE // self.in_features)[0]
        buffer = rows.new_empty(most, self.in_features)

        def part_of(part: slice) -> Tensor:
            return self._reordered(self._unpack_into(buffer[: part.stop - part.start], part.start))

        return product_by_parts(rows, self.out_features, part_of, dtype, low_rank=low_rank)

    def _ordered(self, start: int, stop: int) -> Tensor:
        """Outputs `start` to `stop` -> (outputs, in) integers, the inputs of each group side by side."""
        raise NotImplementedError

    def _by_kernel(self, rows: Tensor) -> Tensor:
        """(rows, in) -> (rows, out), both bfloat16."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.bits} bits in the order of {self.layout}"


class Int4Weight(PackedWeight):
    """A weight of 4-bit integers, whose `codes` are those of `pack_int4`."""

    bits = 4

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None = None) -> None:
        super().__init__(codes, scales, zeros, order)
        size = self.in_features // self.num_groups
        self.kernel_group = next(group for group in INT4_GROUPS if size % group == 0)
        pairs = torch.stack([scales.float(), (8.0 - zeros) * scales.float()], dim=-1)
        pairs = pairs.bfloat16().transpose(0, 1).repeat_interleave(size // self.kernel_group, dim=0)
        self.register_buffer("scales_and_zeros", pairs, persistent=False)

    @staticmethod
    def fits(device_type: str, outputs: int, inputs: int, num_groups: int) -> bool:
        """Whether the kernel of this kind of device takes weights of these widths."""
        size, rest = divmod(inputs, num_groups)
        if rest or size % min(INT4_GROUPS) or outputs % _MOST_OUTPUTS:
            return False
        layout = int4_layout(device_type)
        return layout is not None and inputs % layout.cols == 0

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Like the base class, but another kind of device gets its own order."""
        kind = function(self.scales[:0]).device.type
        integers = self._ordered(0, self.out_features) if kind not in (self.layout, "meta") else None
        super()._apply(function, recurse)
        if integers is not None and self.fits(kind, *integers.shape, self.num_groups):
            self.codes, self.layout = pack_int4(integers.to(self.scales.device)), kind
        return self

    def _ordered(self, start: int, stop: int) -> Tensor:
        return int4_layout(self.layout).unpack(self.codes, start, stop, self.in_features)

    def _by_kernel(self, rows: Tensor) -> Tensor:
        return multiply_int4(rows, self.codes, self.kernel_group, self.scales_and_zeros)


class Int8Weight(PackedWeight):
    """A weight of 8-bit integers with a zero point of 128 and one scale for each output.

    Its `codes` are the integers (out, in) less 128, int8.
    """

    bits = 8

    @staticmethod
    def fits(device_type: str, zeros: Tensor) -> bool:
        """Whether a weight with these zero points (out, groups) is one for the kernel, which CPUs have."""
        return device_type == "cpu" and zeros.shape[1] == 1 and bool((zeros == INT8_ZERO).all())

    def _ordered(self, start: int, stop: int) -> Tensor:
        return self.codes[start:stop].view(torch.uint8) ^ INT8_ZERO

    def _by_kernel(self, rows: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.scales[:, 0].to(torch.bfloat16))


def _type_of_large_products(rows: Tensor) -> torch.dtype:
    """Float32 if half types are multiplied by way of it here, else the type of the rows."""
    forced = {"float32": True, "folded": True, "auto": None}.get(setting(), False)
    if rows.device.type != "cpu" or rows.dtype not in _HALF_TYPES or forced is False:
        return rows.dtype
    wide = forced or _measured(rows.dtype, len(rows)) == "float32"
    return torch.float32 if wide else rows.dtype


def _steps(stop: int, size: int) -> list[tuple[int, int]]:
    """The range up to `stop` in parts of about `size`, which begin at multiples of a tile's outputs."""
    size = max(1, size // _MOST_OUTPUTS) * _MOST_OUTPUTS
    return [(first, min(first + size, stop)) for first in range(0, stop, size)]

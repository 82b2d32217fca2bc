"""What a compiled program costs, read from its HLO text: FLOPs, memory traffic, collectives, loops multiplied out.

XLA's own `cost_analysis` counts the body of a loop once, whatever its length, and every buffer as if it lay in main
memory; a training loop that is a `lax.scan` then looks a thousand times cheaper than it is. Here a body counts as often
as it runs: as XLA states it (`known_trip_count`), or, on TPU where it states nothing, as the loop's counter shows.
A loop that runs until the data say so is counted once and reported in `unknown_loops`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_RENAMED = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "all-gather"}

# One operation per element of the result.
_ELEMENTWISE = re.compile(
    "add|subtract|multiply|divide|remainder|maximum|minimum|power|negate|abs|sign|floor|ceil|round-nearest-even|"
    "round-nearest-afz|exponential|exponential-minus-one|log|log-plus-one|sqrt|rsqrt|cbrt|tanh|tan|sine|cosine|erf|"
    "logistic|atan2|compare|select|clamp|and|or|xor|not|shift-left|shift-right-logical|shift-right-arithmetic|"
    "is-finite|popcnt|count-leading-zeros"
)
# They rename or group buffers, hand over to another computation, or are counted where they began.
_FREE = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id|replica-id|optimization-barrier|"
    "domain|add-dependency|while|conditional|call|async-start|async-update|.*-done"
)
# Calls by which TPU's compiler talks to itself.
_FREE_CUSTOM_CALLS = re.compile(
    "AllocateBuffer|ConcatBitcast|AsyncCollective(Start|Done)|PrepareAsyncCall(Start|Done)|Sharding|"
    "GatherScatterIndicesBitpacked|AssumeGatherIndicesInBound"
)
_SLICES = ("dynamic-slice", "slice", "gather")
_SAME_VALUE = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape")


class Instruction(NamedTuple):
    """One line of HLO: `name = type opcode(operands), attributes`; `root` marks the computation's result."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool


Computation = dict[str, Instruction]


class Traffic(NamedTuple):
    """Collectives of one kind, per device.

    Attributes:
      calls: how many run.
      bytes: of the arrays that are reduced, gathered, scattered or moved; the larger side where sides differ.
      sent: bytes that leave a device, by the ring algorithms: 2 (n - 1) / n of an all-reduce over n devices,
        (n - 1) / n of the others, all of a permutation.
    """

    calls: int
    bytes: int
    sent: float


class Cost(NamedTuple):
    """What one call of a program does on one device.

    Attributes:
      flops: two per multiply-add of dots and convolutions, one per element of elementwise operations and reductions.
      bytes: read from and written to main memory; what XLA keeps in a TPU's vector memory does not count.
      collectives: `kind -> Traffic`.
      unknown_loops: loops whose length is not known before they run; their bodies count once.
      opaque: calls whose insides cannot be seen (LAPACK, Pallas kernels); their FLOPs do not count.
    """

    flops: float
    bytes: float
    collectives: Mapping[str, Traffic]
    unknown_loops: int
    opaque: tuple[str, ...]


def program_cost(hlo: str) -> Cost:
    """The cost of a compiled program, `jax.jit(f).lower(*args).compile().as_text()`.

    Raises:
      ValueError: text that is no HLO module.
    """
    computations, entry = parse(hlo)
    devices = re.search(r"num_partitions=(\d+)", hlo.partition("\n")[0])
    counter = _Counter(computations, int(devices[1]) if devices else 1)
    counter.walk(entry, 1, (), set())
    return Cost(
        counter.flops, counter.bytes, counter.traffic, len(counter.unknown_loops), tuple(sorted(counter.opaque))
    )


def parse(hlo: str) -> tuple[dict[str, Computation], str]:
    """`name -> computation` of a module, and the name of its entry.

    Raises:
      ValueError: text that has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%([^\s(]+) \(.*\{$", line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (start := re.match(r"\s+(ROOT )?%(\S+) = ", line)):
            rest = line[start.end() :]
            cut = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
            opcode, _, tail = rest[cut:].lstrip().partition("(")
            end = _closing("(" + tail) - 1
            operands = tuple(re.findall(r"%([\w.\-]+)", tail[:end]))
            instruction = Instruction(
                start[2], rest[:cut], opcode, operands, tail[:end], tail[end + 1 :], bool(start[1])
            )
            current[start[2]] = instruction
    if not entry:
        raise ValueError(f"no entry computation in a text of {len(hlo)} characters: not an HLO module")
    return computations, entry


def _closing(text: str) -> int:
    """Where the parenthesis that opens the text closes."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    raise ValueError(f"unbalanced parentheses in {text[:60]!r}")


def _arrays(type_text: str) -> Iterable[tuple[int, int, bool]]:
    """(elements, bytes, lies in main memory) of each array in a type."""
    for dtype, shape, layout in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", type_text):
        elements = math.prod(int(size.lstrip("<=")) for size in shape.split(",") if size)
        digits = re.search(r"\d+", dtype)  # f32, bf16, f8e4m3fn, s4, c64; pred takes a byte, a token nothing
        bits = int(digits[0]) if digits else 8 * (dtype == "pred")
        space = re.search(r"S\((\d+)\)", layout)
        yield elements, math.ceil(elements * bits / 8), space is None or space[1] == "0"


def _elements(type_text: str) -> int:
    return sum(elements for elements, _, _ in _arrays(type_text))


def _size(type_text: str) -> int:
    return sum(size for _, size, _ in _arrays(type_text))


def _main_size(type_text: str) -> int:
    return sum(size for _, size, main in _arrays(type_text) if main)


def _shape(type_text: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", type_text)
    return [int(size) for size in found[1].split(",") if size] if found else []


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%([\w.\-]+)", instruction.attributes)
    return found[1] if found else ""


def _indices(instruction: Instruction, name: str) -> list[int]:
    found = re.search(rf"\b{name}={{([\d,]*)}}", instruction.attributes)
    return [int(index) for index in found[1].split(",") if index] if found else []


def _element(instruction: Instruction) -> int:
    """Which element a get-tuple-element takes."""
    return int(instruction.attributes.partition("index=")[2].partition(",")[0])


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.root)


def group_size(attributes: str, devices: int) -> int:
    """Devices that take part in one group of a collective, from its `replica_groups` in any of HLO's three forms."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        # An axis may be taken in part: 'data':(2)4 is a factor 4 of it.
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    return devices


class _Counter:
    """Walks from the entry through loops, branches, calls and fusions, and adds up."""

    def __init__(self, computations: dict[str, Computation], devices: int):
        self.computations = computations
        self.devices = devices
        self.flops = 0.0
        self.bytes = 0.0
        self.traffic: dict[str, Traffic] = {}
        self.unknown_loops: set[str] = set()
        self.opaque: set[str] = set()

    def walk(self, name: str, times: float, frames: tuple, seen: set, fused: bool = False) -> None:
        """Adds a computation that runs `times` times.

        Args:
          name: of the computation.
          times: how often it runs.
          frames: (computation, instruction) of each caller, the innermost last.
          seen: chained collectives of this control-flow computation that have been counted already.
          fused: inside a fusion, where intermediate results never reach memory.
        """
        computation = self.computations[name]
        for instruction in computation.values():
            below = (*frames, (name, instruction))
            called = _attribute(instruction, "calls") or _attribute(instruction, "to_apply")
            kind = instruction.opcode.removesuffix("-start")
            kind = _RENAMED.get(kind, kind)
            if not fused:
                self.bytes += times * self._bytes(computation, instruction)
            if instruction.opcode == "while":
                loops = self.trip_count(name, instruction, frames)
                if loops is None:
                    self.unknown_loops.add(instruction.name)
                for part in ("condition", "body"):
                    self.walk(_attribute(instruction, part), times * (1 if loops is None else loops), below, set())
            elif instruction.opcode == "conditional":
                self._dearest_branch(instruction, times, below)
            elif instruction.opcode == "fusion":
                self.walk(called, times, below, seen, fused=True)
            elif instruction.opcode in ("call", "async-start"):
                self.walk(called, times, below, seen, fused)
            elif kind in COLLECTIVES and not instruction.opcode.endswith("-done"):
                self._collective(kind, name, instruction, times, seen)
            else:
                self.flops += times * self._flops(computation, instruction)

    def _dearest_branch(self, instruction: Instruction, times: float, frames: tuple) -> None:
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = re.findall(r"%([\w.\-]+)", listed[1]) if listed else []
        names = names or [_attribute(instruction, f"{side}_computation") for side in ("true", "false")]
        branches = []
        for name in names:
            branch = _Counter(self.computations, self.devices)
            branch.walk(name, times, frames, set())
            branches.append(branch)
        dearest = max(branches, key=lambda branch: (branch.flops, branch.bytes))
        self.flops += dearest.flops
        self.bytes += dearest.bytes
        for kind, traffic in dearest.traffic.items():
            self._add(kind, traffic)
        self.unknown_loops |= dearest.unknown_loops
        self.opaque |= dearest.opaque

    def _add(self, kind: str, traffic: Traffic) -> None:
        before = self.traffic.get(kind, Traffic(0, 0, 0.0))
        self.traffic[kind] = Traffic(
            before.calls + traffic.calls, before.bytes + traffic.bytes, before.sent + traffic.sent
        )

    def _collective(self, kind: str, name: str, instruction: Instruction, times: float, seen: set) -> None:
        if "async_collective_fusion_config" in instruction.attributes:
            # TPU hides a collective behind several fusions: each repeats it, and they share channel and chain.
            chain = (kind, *re.findall(r"(?:channel_id=|chain_id=\")\d+", instruction.attributes))
            if chain in seen:
                return
            seen.add(chain)
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # a TPU fusion that keeps only the device's own slice of the sum
        computation = self.computations[name]
        size = sum(_size(computation[operand].type) for operand in instruction.operands)
        group = group_size(instruction.attributes, self.devices)
        size *= group if kind == "all-gather" else 1
        share = 1.0 if kind == "collective-permute" else (group - 1) / group
        share *= 2 if kind == "all-reduce" else 1
        self._add(kind, Traffic(int(times), int(times * size), times * size * share))

    def _flops(self, computation: Computation, instruction: Instruction) -> float:
        opcode, operands = instruction.opcode, instruction.operands
        if _ELEMENTWISE.fullmatch(opcode):
            return _elements(instruction.type)
        if opcode == "dot":
            shape = _shape(computation[operands[0]].type)
            contracted = math.prod(shape[axis] for axis in _indices(instruction, "lhs_contracting_dims"))
            return 2 * _elements(instruction.type) * contracted
        if opcode == "convolution":
            return _convolution_flops(computation, instruction)
        if opcode == "reduce":
            return max(0, _elements(computation[operands[0]].type) - _elements(instruction.type))
        if opcode == "reduce-window":
            window = re.search(r"size=([\dx]+)", instruction.attributes)
            return _elements(instruction.type) * (math.prod(map(int, window[1].split("x"))) - 1) if window else 0
        if opcode == "fft":
            found = _indices(instruction, "fft_length")
            return 5 * _elements(instruction.type) * math.log2(max(2, math.prod(found)))
        if opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
            if target and not _FREE_CUSTOM_CALLS.fullmatch(target[1]):
                self.opaque.add(target[1])
        return 0

    def _bytes(self, computation: Computation, instruction: Instruction) -> float:
        """Main memory that an instruction reads and writes."""
        opcode, types = instruction.opcode, [computation[operand].type for operand in instruction.operands]
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        if _FREE.fullmatch(opcode) or (target and _FREE_CUSTOM_CALLS.fullmatch(target[1])):
            return 0
        if opcode == "fusion":
            fused = self.computations[_attribute(instruction, "calls")]
            inputs = {int(i.literal): i.name for i in fused.values() if i.opcode == "parameter"}
            read = [self._read(fused, inputs[k]) for k, text in enumerate(types) if _main_size(text)]
            return sum(read) + self._written(fused, _root(fused), instruction.type)
        if opcode in _SLICES:
            return (bool(_main_size(types[0])) * _size(instruction.type)) + _main_size(instruction.type)
        if opcode in ("dynamic-update-slice", "scatter"):
            update = types[1] if opcode == "dynamic-update-slice" else types[-1]
            return _main_size(update) + bool(_main_size(instruction.type)) * _size(update)
        if opcode in ("copy-start", "slice-start"):  # (copy, source, context); ((source), slice, context)
            arrays = list(_arrays(instruction.type))
            moved, source = arrays[0 if opcode == "copy-start" else 1], arrays[1 if opcode == "copy-start" else 0]
            return moved[1] * (moved[2] + source[2])
        return sum(map(_main_size, types)) + _main_size(instruction.type)

    def _read(self, fused: Computation, name: str) -> int:
        """Bytes of a fusion's argument that the fusion reads: a slice of it costs the slice alone."""
        whole, read = _size(fused[name].type), 0
        for user in (user for user in fused.values() if name in user.operands):
            place = user.operands.index(name)
            if user.opcode in _SLICES and place == 0:
                read += _size(user.type)
            elif user.opcode in ("bitcast", "reshape"):
                read += self._read(fused, user.name)
            elif user.opcode == "fusion":
                inner = self.computations[_attribute(user, "calls")]
                inputs = {int(i.literal): i.name for i in inner.values() if i.opcode == "parameter"}
                read += self._read(inner, inputs[place])
            elif not (user.opcode == "tuple" or (user.opcode == "dynamic-update-slice" and place == 0)):
                return whole
        return min(whole, read)

    def _written(self, fused: Computation, result: Instruction, type_text: str) -> int:
        """Bytes that a fusion writes: updating a slice in place costs the slice alone."""
        if result.opcode == "tuple":
            return sum(self._written(fused, fused[name], fused[name].type) for name in result.operands)
        if result.opcode == "bitcast":
            return self._written(fused, fused[result.operands[0]], type_text)
        if result.opcode == "parameter" or not _main_size(type_text):
            return 0
        if result.opcode == "dynamic-update-slice":
            return _size(fused[result.operands[1]].type)
        return _size(type_text)

    def trip_count(self, name: str, loop: Instruction, frames: tuple) -> int | None:
        """How often a `while` in computation `name` runs: as XLA states it, or by its counter, else None."""
        if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(stated[1])
        condition, body = _attribute(loop, "condition"), _attribute(loop, "body")
        inside = (*frames, (name, loop))
        place, test, test_frames = self._origin(condition, _root(self.computations[condition]).name, inside)
        direction = re.search(r"direction=(\w+)", test.attributes)
        if test.opcode != "compare" or not direction:
            return None
        _, counter, _ = self._origin(place, test.operands[0], test_frames)
        limit = self._value(place, test.operands[1], test_frames)
        if counter.opcode != "get-tuple-element" or limit is None:
            return None
        index = _element(counter)
        start_place, start_tuple, start_frames = self._origin(name, loop.operands[0], frames)
        result = _root(self.computations[body])
        if start_tuple.opcode != "tuple" or result.opcode != "tuple":
            return None
        start = self._value(start_place, start_tuple.operands[index], start_frames)
        place, change, change_frames = self._origin(body, result.operands[index], inside)
        if start is None or change.opcode not in ("add", "subtract"):
            return None
        _, before, _ = self._origin(place, change.operands[0], change_frames)
        step = self._value(place, change.operands[1], change_frames)
        if before.opcode != "get-tuple-element" or _element(before) != index or not step:
            return None
        step = -step if change.opcode == "subtract" else step
        limit += {"LE": 1, "GE": -1}.get(direction[1], 0)
        towards = {"LT": step > 0, "LE": step > 0, "GT": step < 0, "GE": step < 0}
        return max(0, math.ceil((limit - start) / step)) if towards.get(direction[1]) else None

    def _value(self, place: str, name: str, frames: tuple) -> int | None:
        _, origin, _ = self._origin(place, name, frames)
        is_whole = origin.opcode == "constant" and re.fullmatch(r"-?\d+", origin.literal)
        return int(origin.literal) if is_whole else None

    def _origin(self, place: str, name: str, frames: tuple) -> tuple[str, Instruction, tuple]:
        """The instruction that a value comes from, through copies, fusions, tuples and what loops leave as it is."""
        instruction = self.computations[place][name]
        caller_place, caller = frames[-1] if frames else ("", None)
        if instruction.opcode in _SAME_VALUE:
            return self._origin(place, instruction.operands[0], frames)
        if instruction.opcode in ("fusion", "call"):
            called = _attribute(instruction, "calls") or _attribute(instruction, "to_apply")
            return self._origin(called, _root(self.computations[called]).name, (*frames, (place, instruction)))
        if instruction.opcode == "parameter" and caller and caller.opcode in ("fusion", "call"):
            return self._origin(caller_place, caller.operands[int(instruction.literal)], frames[:-1])
        if instruction.opcode == "get-tuple-element":
            index = _element(instruction)
            source_place, source, source_frames = self._origin(place, instruction.operands[0], frames)
            if source.opcode == "tuple":
                return self._origin(source_place, source.operands[index], source_frames)
            if source.opcode == "parameter" and caller and caller.opcode == "while" and self._kept(caller, index):
                start_place, start, start_frames = self._origin(caller_place, caller.operands[0], frames[:-1])
                if start.opcode == "tuple":
                    return self._origin(start_place, start.operands[index], start_frames)
        return place, instruction, frames

    def _kept(self, loop: Instruction, index: int) -> bool:
        """Whether a loop's body hands on this element of its state unchanged."""
        body = self.computations[_attribute(loop, "body")]
        result = _root(body)
        kept = body[result.operands[index]] if result.opcode == "tuple" else result
        is_element = kept.opcode == "get-tuple-element" and body[kept.operands[0]].opcode == "parameter"
        return is_element and _element(kept) == index


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """Two per multiply-add; taps that fall on padding, or between dilated inputs, do not count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if not labels:
        return 0
    inputs, kernel = (_shape(computation[operand].type) for operand in instruction.operands[:2])
    output = _shape(instruction.type)
    window = dict(
        re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.attributes) or " ")[0])
    )

    def field(name: str, axis: int, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    batch_groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    flops = 2.0 * inputs[labels[1].index("b")] / (int(batch_groups[1]) if batch_groups else 1)
    flops *= output[labels[3].index("f")] * kernel[labels[2].index("i")]
    for axis in range(len(inputs) - 2):
        flops *= _taps(
            inputs[labels[1].index(str(axis))],
            kernel[labels[2].index(str(axis))],
            output[labels[3].index(str(axis))],
            stride=int(field("stride", axis, "1")),
            pad=int(field("pad", axis, "0_0").split("_")[0]),
            input_dilation=int(field("lhs_dilate", axis, "1")),
            kernel_dilation=int(field("rhs_dilate", axis, "1")),
        )
    return flops


def _taps(
    inputs: int, kernel: int, outputs: int, stride: int, pad: int, input_dilation: int, kernel_dilation: int
) -> int:
    """Pairs of an output and a tap of the kernel that meet an input, along one axis."""
    if outputs * kernel > 10**8:
        return outputs * min(kernel, inputs)
    places = np.arange(outputs)[:, None] * stride + np.arange(kernel) * kernel_dilation - pad
    return int(np.sum((places >= 0) & (places <= (inputs - 1) * input_dilation) & (places % input_dilation == 0)))

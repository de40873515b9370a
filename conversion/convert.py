"""Original checkpoint (and hift.pt) -> converted checkpoint, one tensor at a time.

Never holds more than a few tensors in memory: the plan is made from the headers of the safetensors files alone, every problem is
reported before anything is written, and each finished shard is moved into place, so that an interrupted conversion goes on where
it stopped.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ..configuration_baichuan_audio import BaichuanAudioConfig
from ..modeling_baichuan_audio import BaichuanAudioForCausalLM
from ..original_format import DROPPED_KEYS, KEY_RENAMES, KEY_SPLITS, ORIGINAL_MODEL_TYPE, VISION_KEYS
from .companions import save_companions
from .tiny import untrained_checkpoint
from .vocoder import convert_vocoder, read_vocoder_file


_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_FLOATS = ("F64", "F32", "F16", "BF16")
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class PlannedTensor:
    """One tensor of the result: a whole tensor of a source file, or the part `start:stop` of it along `dim`."""

    name: str
    source: str
    shape: list[int]
    dtype: str
    dim: int | None = None
    start: int = 0
    stop: int = 0

    def read(self, file: Path) -> torch.Tensor:
        with safe_open(file, framework="pt") as reader:
            if self.dim is None:
                tensor = reader.get_tensor(self.source)
            else:
                index = (slice(None),) * self.dim + (slice(self.start, self.stop),)
                tensor = reader.get_slice(self.source)[index]
            return tensor.to(_TORCH_DTYPES[self.dtype]).contiguous()


@dataclass
class ConversionReport:
    """What a conversion did: tensors written, dropped on purpose, vision tensors ignored, bytes and shard files."""

    tensors: int
    dropped: int
    vision: int
    total_bytes: int
    shards: list[str]


def _miniature() -> Path:
    """The miniature's folder, beside this one."""
    folder = Path(__file__).parents[1] / "miniature"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"This copy of the package comes without the miniature: {folder} does not hold it. Its training is described "
            "in training/miniature/README.md."
        )
    return folder


# Checkpoints that have a name of their own, and what finds their folder.
BY_NAME = {"miniature": _miniature, "untrained": untrained_checkpoint}


def find_checkpoint(checkpoint: str | Path) -> Path:
    """
    A folder, "untrained" for the tiny checkpoint that is made on this machine, "miniature" for a trained one in the package's own
    folder, or the local copy of a Hub repository.

    Raises:
        ValueError: neither exists.
    """
    if checkpoint in BY_NAME:  # a folder of such a name is ./miniature
        return BY_NAME[checkpoint]()
    folder = Path(checkpoint)
    if folder.is_dir():
        return folder.absolute()  # or ./miniature would be taken for the name, once it is written without its dot
    if folder.is_absolute() or str(checkpoint).count("/") != 1:
        raise ValueError(f"Checkpoint {checkpoint} is neither a folder nor a Hub repository, nor {' or '.join(BY_NAME)}.")
    try:
        return Path(snapshot_download(str(checkpoint)))
    except Exception as error:  # many kinds: offline, not found, gated
        raise ValueError(f"Checkpoint {checkpoint} is no folder and cannot be had from the Hub: {error}") from error


def read_config(folder: Path) -> BaichuanAudioConfig:
    """The config of an original or a converted checkpoint.

    Raises:
        ValueError: no config, or that of another kind of model.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no config.json.")
    model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    known = (ORIGINAL_MODEL_TYPE, BaichuanAudioConfig.model_type)
    if model_type not in known:
        raise ValueError(f"{folder} holds a model of type {model_type}; {' and '.join(known)} can be converted.")
    return BaichuanAudioConfig.from_pretrained(folder)


def source_shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        ValueError: none, or one that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}. Only safetensors checkpoints are read.")
    return [folder / name for name in names]


def renamed_key(name: str) -> str:
    """Our name of an original tensor, before fused tensors are cut; our own names come back unchanged."""
    for pattern, replacement in KEY_RENAMES:
        name = re.sub(pattern, replacement, name, count=1)
    return name


def _plan_tensor(name: str, shape: list[int], dtype: str, expected: dict[str, torch.Size]) -> list[PlannedTensor]:
    ours = renamed_key(name)
    for ending, pieces, dim in KEY_SPLITS:
        if ours.endswith("." + ending) and len(shape) > dim:
            planned, start = [], 0
            for piece in pieces:
                target = ours.removesuffix(ending) + piece
                size = rest = shape[dim] - start
                if piece != pieces[-1]:  # the last one takes all that is left, so that too much of it is noticed
                    size = min(rest, expected[target][dim] if target in expected else shape[dim] // len(pieces))
                piece_shape = [*shape[:dim], size, *shape[dim + 1 :]]
                planned.append(PlannedTensor(target, name, piece_shape, dtype, dim, start, start + size))
                start += size
            return planned
    return [PlannedTensor(ours, name, list(shape), dtype)]


def plan_conversion(
    shards: list[Path], expected: dict[str, torch.Size], dtype: torch.dtype | None
) -> tuple[list[list[PlannedTensor]], int, int]:
    """
    What goes into each output shard, from the headers alone.

    Returns:
        The planned tensors of each shard, the number of tensors dropped on purpose and the number of vision tensors ignored.

    Raises:
        ValueError: missing, mis-shaped, doubled or unknown tensors, the message lists them; or a damaged file.
    """
    plans, dropped, vision, found, problems = [], 0, 0, set(), []
    for shard in shards:
        plan = []
        try:
            file = safe_open(shard, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{shard} is damaged: {error}") from error
        with file as reader:
            for name in reader.keys():  # noqa: SIM118 (safe_open is no mapping)
                if re.search(VISION_KEYS, name):
                    vision += 1
                    continue
                if any(re.search(pattern, name) for pattern in DROPPED_KEYS):
                    dropped += 1
                    continue
                header = reader.get_slice(name)
                stored = header.get_dtype()
                cast = dtype is not None and stored in _FLOATS and not name.startswith("vocoder.")
                plan += _plan_tensor(name, header.get_shape(), _DTYPE_NAMES[dtype] if cast else stored, expected)
        plans.append(plan)
    for planned in (tensor for plan in plans for tensor in plan):
        if planned.name in found:
            problems.append(f"{planned.name} is there twice, once as {planned.source}")
        found.add(planned.name)
        if planned.name not in expected:
            problems.append(f"{planned.source} is unknown")
        elif planned.dtype not in _TORCH_DTYPES:
            problems.append(f"{planned.source} has the unsupported type {planned.dtype}")
        elif list(expected[planned.name]) != planned.shape:
            problems.append(f"{planned.name} has shape {planned.shape} instead of {list(expected[planned.name])}")
    problems += [f"{name} is missing" for name in expected if name not in found]
    if problems:
        raise ValueError(f"The checkpoint does not fit its config in {len(problems)} tensors: {'; '.join(problems)}")
    return plans, dropped, vision


def split_plan(plan: list[PlannedTensor], max_size: int | None) -> list[list[PlannedTensor]]:
    """A file's tensors, in order, as groups of at most `max_size` bytes; a larger tensor has a group of its own."""
    groups, size = [], 0
    for tensor in plan:
        nbytes = torch.Size(tensor.shape).numel() * _TORCH_DTYPES[tensor.dtype].itemsize
        if not groups or (max_size is not None and size + nbytes > max_size):
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += nbytes
    return groups


def write_shard(
    path: Path, tensors: list[tuple[str, list[int], str]], read: Callable[[int], torch.Tensor], tick: Callable[[int], None]
) -> int:
    """
    Writes one safetensors file tensor by tensor. (`safetensors.save_file` needs all of them in memory at once.)

    Args:
        tensors: name, shape and safetensors dtype of each. read: index -> the tensor. tick: told the bytes written.

    Returns:
        Bytes of tensor data.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, dtype in tensors:
        size = torch.Size(shape).numel() * _TORCH_DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for index in range(len(tensors)):
            tensor = read(index)
            if tensor.numel():
                tick(file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy())))
    part.replace(path)
    return offset


def _expected_shapes(config: BaichuanAudioConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = BaichuanAudioForCausalLM(config)
    tied = set(model.all_tied_weights_keys)
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}


def _with_vocoder(config: BaichuanAudioConfig, hift: str | Path) -> tuple[BaichuanAudioConfig, dict[str, torch.Tensor]]:
    """The config with a vocoder, and the vocoder's tensors under the model's names."""
    config.vocoder_config, state = convert_vocoder(read_vocoder_file(hift))
    config.vocoder_config.dtype = torch.float32  # also when it is loaded alone, out of a checkpoint in another dtype
    config = BaichuanAudioConfig.from_dict(config.to_dict())  # checked again as a whole
    return config, {f"vocoder.{name}": tensor for name, tensor in state.items()}


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    hift: str | Path | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    max_shard_size: int | None = None,
) -> ConversionReport:
    """
    Converts an original checkpoint, or adds a vocoder to a converted one.

    Args:
        checkpoint: folder or Hub id, original (model type "omni") or converted.
        output: folder to make; it must not exist, or be empty.
        hift (*optional*): the vocoder's `hift.pt`.
        dtype (*optional*): of the floating-point tensors except the vocoder's; unchanged by default.
        progress: called with bytes written and bytes in all.
        max_shard_size (*optional*): most bytes of a weight file, but for a single larger tensor; as the source's files are by default.

    Raises:
        ValueError: anything that is missing, misshapen or in the way. Nothing has been written then.
    """
    output = Path(output).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"Output {output} exists already. Name a new or an empty folder.")
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype}.")
    source = find_checkpoint(checkpoint)
    config = read_config(source)
    if dtype is not None:
        config.dtype = dtype
        for name in config.sub_configs:
            if name != "vocoder_config":
                getattr(config, name).dtype = dtype
    shards = source_shards(source)
    if hift is not None and config.vocoder_config is not None:
        raise ValueError(f"{checkpoint} has a vocoder already.")
    plans, dropped, vision = plan_conversion(shards, _expected_shapes(config), dtype)
    parts = [(piece, shard) for plan, shard in zip(plans, shards) for piece in split_plan(plan, max_shard_size)]
    vocoder_state: dict[str, torch.Tensor] = {}
    if hift is not None:
        config, vocoder_state = _with_vocoder(config, hift)

    part = output.with_name(f".{output.name}.part")
    fingerprint = json.dumps(
        {
            "files": [
                [str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in [*shards, *([Path(hift)] if hift else [])]
            ],
            "plan": [[asdict(tensor) for tensor in plan] for plan, _ in parts],
        },
        sort_keys=True,
    )
    if not (part / "plan.json").is_file() or (part / "plan.json").read_text() != fingerprint:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / "plan.json").write_text(fingerprint)

    jobs = [
        ([(t.name, t.shape, t.dtype) for t in plan], lambda i, plan=plan, shard=shard: plan[i].read(shard))
        for plan, shard in parts
    ]
    if vocoder_state:
        tensors = list(vocoder_state.items())
        jobs.append(
            ([(name, list(t.shape), _DTYPE_NAMES[t.dtype]) for name, t in tensors], lambda i, tensors=tensors: tensors[i][1])
        )
    total = sum(torch.Size(shape).numel() * _TORCH_DTYPES[d].itemsize for specs, _ in jobs for _, shape, d in specs)
    written, weight_map, names = 0, {}, []

    def tick(size: int) -> None:
        nonlocal written
        written += size
        progress(written, total)

    for number, (specs, read) in enumerate(jobs, 1):
        name = f"model-{number:05d}-of-{len(jobs):05d}.safetensors"
        names.append(name)
        weight_map |= {spec[0]: name for spec in specs}
        if (part / name).is_file():  # finished by an earlier, interrupted run
            tick(sum(torch.Size(shape).numel() * _TORCH_DTYPES[d].itemsize for _, shape, d in specs))
        else:
            write_shard(part / name, specs, read, tick)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    save_companions(source, part, config)
    (part / "plan.json").unlink()
    if output.is_dir():
        output.rmdir()
    part.replace(output)
    return ConversionReport(len(weight_map), dropped, vision, total, names)

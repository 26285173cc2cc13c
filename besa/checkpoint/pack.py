"""From a pruned checkpoint to a packed one, block by block: neither is ever in memory as a whole."""

import json
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from besa.checkpoint.format import (
    carry_over,
    check_new,
    new_folder,
    open_source,
    prefixes_of,
    rest_of,
    stored_names,
    write_index,
    write_shard,
)
from besa.decoder import find_blocks
from besa.inputs.models import STATE
from besa.machine.files import check_same, write_text
from besa.masks import KeepMasks
from besa.packed import pack_block
from besa.packed_files import described, packed_projections
from besa.quantize import QuantizedFiles


def pack_checkpoint(source: str | Path, output: str | Path, trust_remote_code: bool = False) -> tuple[int, int]:
    """Write a pruned checkpoint packed, as `save_packed` would; `from_pretrained` and `load_model` read it.

    Args:
        source: an output of `prune_checkpoint`, whose keep-masks and codes are taken; or another checkpoint, by any
            name that `load_model` takes, of which everything that is not 0 is kept.
        output: a folder to make.
        trust_remote_code: run the Python code that comes with the source.

    Returns:
        Bytes of the source's files of weights, and of the output's.

    Raises:
        ValueError: source and output do not go together, masks or codes are of other weights, or nothing would shrink.
        OSError: the disk refuses a file.
    """
    output = Path(output)
    check_new(output)
    folder, model, marks = open_source(source, output, trust_remote_code)
    with new_folder(output) as temporary:
        shards, packed = _write_shards(model, folder / STATE, temporary, marks)
        if not packed:
            raise ValueError(
                f"no projection of {str(source)!r} would be smaller packed: it has too few zeros; prune it first"
            )
        carry_over(folder, temporary)
        config = json.loads((folder / "config.json").read_bytes())
        config["quantization_config"] = described(packed).to_dict()
        write_text(temporary / "config.json", json.dumps(config, indent=2) + "\n")
        write_index(shards, temporary)
        before, after = (sum(path.stat().st_size for path in paths) for paths in (marks, shards))
        return before, after


def _write_shards(
    model: PreTrainedModel, state: Path, output: Path, marks: dict[Path, list[str | int]]
) -> tuple[list[Path], dict[str, nn.Module]]:
    """A shard per block, then one of what is in no block; the packed projections, on the meta device, by name.

    Args:
        marks: of the files that the model is mapped from.
    """
    blocks, masks, packed = find_blocks(model), KeepMasks(), {}
    prefixes, shards = prefixes_of(model), []
    for path in sorted(state.glob("masks-*.safetensors")):
        masks.load(path)
    codes = QuantizedFiles(*sorted(state.glob("codes-*.safetensors")))
    kept = masks if masks or codes else None  # no run of besa: what is not 0
    for index, prefix in enumerate(prefixes):
        check_same(marks)
        block, blocks[index] = blocks[index], nn.Module()  # gone once it is written
        pack_block(index, block, kept, codes)
        tensors = {f"{prefix}.{name}": tensor for name, tensor in block.state_dict().items()}
        shards.append(output / f"model-block-{index:05d}.safetensors")
        write_shard({stored: tensors[name] for name, stored in stored_names(model, tensors).items()}, shards[-1])
        packed |= {f"{prefix}.{name}": module.to("meta") for name, module in packed_projections(block).items()}
    shards.append(output / "model-rest.safetensors")
    write_shard(rest_of(model, prefixes), shards[-1])
    return shards, packed

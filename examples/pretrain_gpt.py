"""A pretrain script with data of its own, made hybrid as the README shows: the arguments, the forward step, the call.

    python examples/pretrain_gpt.py --data-path PREFIX ...               Megatron's own pretraining, as without us
    python examples/pretrain_gpt.py --hybrid --hybrid-prompts FILE ...   the same script, training online

Data: Megatron's GPTDataset over the indexed dataset that tools/preprocess_data.py writes, read by every rank. Layouts:
whatever GPTModel has. 5_from_a_text_corpus.sh runs it both ways; under torchrun it is every rank's program.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

# Before anything imports Megatron, which warns that there is no GPU library, once for each it would have used.
warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import megatron_hybrid as mh  # noqa: E402

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Training, validation and test set, of --data-path and --split."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.training import get_args
    from megatron.training.global_vars import get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, num_samples, lambda: True, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank builds and reads them


def get_batch(data_iterator: Iterator[dict[str, Tensor]]) -> tuple[Any, ...]:
    """tokens, labels, loss_mask, attention_mask, position_ids, each [b, s/cp]."""
    from megatron.core import mpu
    from megatron.core.utils import get_batch_on_this_cp_rank

    device = torch.device(torch.cuda.current_device())
    whole = {name: value.to(device) for name, value in next(data_iterator).items()}
    own = get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return own["tokens"], own["labels"], own["loss_mask"], None, own["position_ids"]


def loss_func(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's three-tuple under --calculate-per-token-loss: sum, count, what is reported."""
    total, count = (output.float() * loss_mask).sum(), loss_mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def main() -> None:
    if "RANK" not in os.environ:  # started by hand, not by a launcher
        os.environ.update(ALONE)
    mh.cpu.enable()  # does nothing where there is a GPU

    from megatron.core.enums import ModelType
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(mh.add_hybrid_args)
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    forward_step = mh.HybridForwardStep(get_batch=get_batch, base_loss_func=loss_func)
    mh.pretrain_hybrid(container, datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    try:
        main()
    except mh.errors.HybridError as error:
        sys.exit(f"error: {error}")

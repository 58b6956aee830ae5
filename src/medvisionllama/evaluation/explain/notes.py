"""What has to be said before a network's maps are believed: stages it lacks, and what its maps cannot show."""

from typing import Any

from medvisionllama.inference.activations import last_layer
from medvisionllama.inference.predictor import Member
from medvisionllama.networks.inserts import LLMInsert, MLPInsert

_NEGLIGIBLE_GATE = 1e-3


def notes_on(member: Member) -> list[str]:
    """Sentences on a network with tokens; none for one that has every stage and nothing unusual."""
    network = member.network
    notes = []
    if (num := member.config.train.members) > 1:
        notes.append(
            f"The run averages {num} networks; maps, and any mask of its own, are those of the first."
        )
    if last_layer(network.encoder) is None:
        notes.append(
            "The encoder has no transformer block: its map shows the embedded tokens, and it has no attention."
        )
    if last_layer(network.decoder) is None:
        notes.append(
            "The decoder has no transformer block: its map shows what it is given, and it has no attention."
        )
    insert = network.insert
    if isinstance(insert, LLMInsert):
        notes += _notes_on_block(insert, network.num_prompt_tokens)
    elif isinstance(insert, MLPInsert):
        notes.append(
            "No maps after VD1, block and VD2: the insert is an MLP, whose own output is the stage mlp."
        )
    else:
        notes.append("No maps after VD1, block and VD2: the network has no insert (network.insert=none).")
    if (size := network.gate_rms) is not None:
        closed = " It is as good as closed: what the insert does hardly reaches the mask." * (
            size < _NEGLIGIBLE_GATE
        )
        notes.append(
            f"The insert's gate has a root mean square of {size:.2g}: its output is multiplied by that before the decoder.{closed}"
        )
    return notes


def _notes_on_block(insert: LLMInsert, words: int) -> list[str]:
    block = insert.block
    if not len(block.layers):
        return ["No map after the block: it is the identity (network.block.weights=identity)."]
    notes = []
    if block.norm is not None:
        notes.append(
            "Token norms after the block are taken before the language model's last norm, which would make them nearly equal."
        )
    if _ends_in_a_norm(block.config):
        notes.append(
            "The block's layer ends in a norm of its own, so that norms after it are nearly equal and say little."
        )
    if block.causal:
        notes.append(
            "The block masks attention as its language model does: a token is compared with the share it would get from those that may see it."
        )
    if words:
        notes.append(
            f"The prompt's {words} tokens stand before the scan's in the block: they take their share of attention and are on no map."
        )
    return notes


def _ends_in_a_norm(config: Any) -> bool:
    return config.model_type in {"bert", "roberta"} or not getattr(config, "do_layer_norm_before", True)

"""Every setting of a run: its type, its default, its limits and what it means.

Unknown keys are errors, and so are values that contradict each other; both are found when the configuration is
built, before a scan is read or a weight allocated.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from medvisionllama.types import (
    Architecture,
    BlockStorage,
    BlockWeights,
    DeviceChoice,
    FoldName,
    MapperKind,
    PrecisionChoice,
    PromptControl,
    Rotary,
)

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Size = tuple[Positive, Positive, Positive]
Step = Annotated[int, Field(ge=1, le=4)]
Stride = tuple[Step, Step, Step]


def parse_layers(text: Any) -> tuple[Any, ...]:
    """Read `-1`, `0,1` or `28:30`; what is no text stays as it is.

    Raises:
        ValueError: it names no layer.
    """
    if not isinstance(text, str):
        return (text,)
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, colon, end = part.partition(":")
            if len(part) > 12 or (colon and int(end) - int(first) > 10_000):
                raise ValueError
            numbers += range(int(first), int(end)) if colon else [int(first)]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"{text!r} names no layer; write -1, or 0,1, or 28:30 (28 and 29)")
    return tuple(numbers)


def parse_window(text: str) -> tuple[float, float]:
    """Read `-160:240`.

    Raises:
        ValueError: not two numbers, the smaller first.
    """
    low, _, high = text.partition(":")
    try:
        window = float(low), float(high)
    except ValueError:
        window = math.nan, math.nan
    if not -math.inf < window[0] < window[1] < math.inf:
        raise ValueError(f"{text!r} is no rule; write auto, image, dataset, or a window as -160:240")
    return window


class Section(BaseModel):
    """A group of settings: unknown keys refused, values frozen once built, docstrings under fields kept as help."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )


class DataConfig(Section):
    path: Path | None = None
    """An MSD folder, an nnU-Net raw folder, or a folder with images/ and labels/."""
    modality: tuple[str, ...] | None = None
    """Names of the channels, in order; `CT` is scaled by its units, all else scan by scan. By default as the
    dataset says; a folder with images/ and labels/ says so in names.json only, or give --set data.modality=CT."""
    labels: Literal["all", "foreground"] = "all"
    """Segment every class (softmax), or all of them merged to one foreground (sigmoid), as published."""
    geometry: Literal["native", "resize"] = "native"
    """Crop at the dataset's median spacing, or squeeze the whole volume into `crop_size`, as published."""
    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Spacing of training in x, y, z; by default the fingerprint's median (see `thick_axis_percentile`), where a
    crop shows enough of it (see `coarsest_mm`). No effect with geometry=resize."""
    coarsest_mm: Annotated[float, Field(ge=0)] = 2.0
    """Where a crop of `max_crop_voxels` would show less than an eighth of the median scan, or two fifths of a scan
    with thick slices, fine axes are made coarser until it does, but not coarser than this; 0 keeps the scans' own
    spacing. No effect beside spacing_mm or crop_size."""
    thick_axis_percentile: Annotated[float, Field(ge=0, le=100)] = 10.0
    """Where slices are thick, few and differ between scans, their spacing is this percentile; 50 is the median."""
    crop_size: Size | None = None
    """Voxels of a training crop in x, y, z; by default from the fingerprint and `max_crop_voxels`."""
    max_crop_voxels: Positive = 131_072
    """Upper limit of a planned crop: the compute of one step grows with it."""
    strides: tuple[Stride, Stride, Stride] | None = None
    """Downsampling in x, y, z at the stem's second and third stage and at the tokens, as [[2,2,1],[2,2,1],[2,2,2]];
    by default axes with thick slices are halved later. Only with network.head=skip."""
    flip_axes: tuple[Literal["x", "y", "z"], ...] | None = None
    """Axes that are mirrored, as x or x,y or []; by default x, unless class names tell left from right."""
    normalisation: tuple[str, ...] | None = None
    """How each channel is scaled, in order: `image` by each scan's own mean and deviation, `dataset` by percentiles
    of labelled voxels, a window as -160:240, or `auto`: `dataset` for CT, else `image`."""
    patient_pattern: str | None = None
    """Regular expression whose first group is the patient in a case's name; by default a rule that knows frames,
    phases, visits and time points."""
    exclude: tuple[str, ...] = ()
    """Cases and patients to leave out, for example those that `data check` found: patient076,patient012_frame01."""
    splits: Path | None = None
    """A splits file to use instead of drawing one."""
    split_seed: Seed = 0
    """Seed of the split; equal seeds give equal splits whatever the model."""
    fold: FoldName = 0
    """Which fold validates. `all` trains on every labelled case, those of the test too: the run to use once others
    have shown what to expect, as no case is left to choose weights by or to score it."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the fold's training patients used; smaller shares are subsets of larger ones."""
    num_cases: Positive | None = None
    """Number of training cases used instead of a fraction: whole patients until it is reached, nested like
    fractions; the last one's cases may exceed it."""
    foreground_share: Share = 0.5
    """Share of crops centred on a labelled voxel, classes taking turns."""

    @field_validator("fold", mode="before")
    @classmethod
    def _known_fold(cls, fold: object) -> object:
        if fold != "all" and not (isinstance(fold, int | str) and str(fold).isdecimal()):
            raise ValueError("must be the number of a fold, from 0, or all")
        return fold

    @model_validator(mode="after")
    def _all_is_all(self) -> "DataConfig":
        if self.fold == "all" and (self.num_cases is not None or self.fraction < 1):
            raise ValueError(
                "data.fold=all trains on every labelled case; drop --cases and --fraction, or choose a fold by its number"
            )
        return self

    @field_validator("normalisation")
    @classmethod
    def _known_rules(cls, rules: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for rule in rules or ():
            if rule not in {"auto", "image", "dataset"}:
                parse_window(rule)
        return rules


class UnlabelledConfig(Section):
    """Scans without labels that train too, by the masks that the network itself gives them."""

    scans: Literal["none", "unused"] | Path = "none"
    """A folder of scans like the dataset's, DICOM included; or `unused`, the fold's training scans that num_cases
    or fraction leave out, whose labels stay unread."""
    share: Share = 0.5
    """Share of the crops that come from them once they have masks."""
    rounds: Positive = 3
    """How often they get new masks, evenly spread over the run; before the first they are not seen."""
    per_round: Positive = 64
    """So many of them are segmented each time, drawn anew, however many there are."""


class AugmentConfig(Section):
    enabled: bool = True
    """False trains on crops as they are."""
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 20.0
    """Largest rotation about each axis; a crop of few slices turns a quarter as far out of its planes. Thick slices
    (over three times as far apart as the voxels in them) are turned, zoomed and bent in their plane alone."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.8, 1.25)
    """Range of zoom, the same along all axes but across thick slices, drawn evenly in its logarithm."""
    translation: Share = 0.1
    """Largest shift as a share of the crop; across thick slices, by whole ones."""
    spatial_probability: Share = 0.8
    """Probability that a crop is rotated, zoomed and shifted at all."""
    elastic: Share = 0.0
    """Largest standard deviation of an elastic displacement, as a share of the crop; above 0.05 scans may fold."""
    elastic_probability: Share = 0.5
    """Probability of an elastic displacement, per crop."""
    bias_field: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Largest standard deviation of the logarithm of a smooth gain, such as MR coils have, over about 70 mm; for
    channels that are normalised scan by scan."""
    bias_field_probability: Share = 0.5
    """Probability of such a gain, per crop."""
    flip: Literal["auto", "none"] = "auto"
    """`auto` mirrors left and right unless the class names tell left from right."""
    intensity_probability: Share = 0.3
    """Probability of each of brightness, contrast, gamma, noise, blur and low resolution, per case."""

    @field_validator("scale")
    @classmethod
    def _ascends(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] > scale[1]:
            raise ValueError("the range runs backwards; write it as [smaller, larger]")
        return scale


class BlockConfig(Section):
    source: str = "smollm2-135m"
    """A name of the catalogue (`medvisionllama llm list`), a local folder or file of safetensors or GGUF, or a
    Hub id `organisation/name` or `organisation/name@revision`."""
    layers: Annotated[tuple[int, ...], Field(min_length=1)] = (-1,)
    """Which layers, counted from the front, or from the back if negative: -1, or 0,1, or 28:30 (28 and 29)."""
    weights: BlockWeights = "pretrained"
    """Controls replace the language model's weights: random from its family's initialiser; random, each tensor with
    its own mean and deviation; each tensor's own values shuffled; or no layer at all."""
    frozen: bool = True
    """False trains the block with the rest: the control for freezing it."""
    rotary: Rotary = False
    """Give the tokens rotary positions: along their sequence, as in the language model, or along x, y and z."""
    causal: bool = False
    """Mask attention as the language model does."""
    final_norm: bool = True
    """Apply the language model's own last norm to the block's output."""
    prompt: str = ""
    """Words to set before the visual tokens inside the block, as the language model's own embeddings."""
    prompt_control: PromptControl = "text"
    """Replace the prompt by as many nonsense tokens, or by random vectors of its mean and deviation."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the LoRA update inside the block; 0 leaves it out."""
    lora_targets: tuple[str, ...] = ()
    """Projections that LoRA updates; by default query and value."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the block is kept; `bfloat16` takes half the memory, and loses nothing of a checkpoint
    in bfloat16, as most are."""
    storage: BlockStorage = "full"
    """`int8` keeps the frozen matrices as 8-bit integers."""
    gradient_checkpointing: bool = False
    """Compute the block's activations again in the backward pass instead of keeping them."""

    @field_validator("layers", mode="before")
    @classmethod
    def _read_layers(cls, value: Any) -> Any:
        parts = value if isinstance(value, list | tuple) else [value]
        return tuple(number for part in parts for number in parse_layers(part))

    @field_validator("lora_targets", mode="before")
    @classmethod
    def _one_target(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> "BlockConfig":
        # Settings without effect would give an arm of a comparison another arm's name.
        if not self.frozen and (self.lora_rank or self.storage == "int8" or self.dtype != "float32"):
            raise ValueError(
                "frozen=false needs float32 without lora_rank and storage=int8; give one of them"
            )
        if self.prompt_control != "text" and not self.prompt.strip():
            raise ValueError("prompt_control has no effect without prompt; give both")
        if self.lora_targets and not self.lora_rank:
            raise ValueError("lora_targets has no effect without lora_rank; give both")
        altered = self.lora_rank or self.prompt or self.storage == "int8" or not self.frozen
        if self.weights == "identity" and (altered or self.rotary or self.causal):
            raise ValueError(
                "weights=identity has no layer for lora_rank, prompt, rotary, causal, storage=int8 or frozen=false"
            )
        return self


_MAPPER_RANK, _PATCH_SIZE = 4, 8
_WIDTHS = {"segresnet": 8, "swin_unetr": 12}
"""What the first stage's channels must be a multiple of: groups of a norm, heads of attention."""


class NetworkConfig(Section):
    architecture: Architecture = "tokens"
    """`tokens` is ours. The others are MONAI's networks, to compare with: same crops, loss, schedule, prediction.
    Each is a preset of its own, and of the settings below has base_channels alone."""
    base_channels: Positive | None = None
    """Channels of the first stage of such a network, or its feature size; by default the published."""
    tokens: bool = True
    """False leaves stem and skip head alone: the control that shows what the tokens add."""
    insert: Literal["llm", "mlp", "none"] = "llm"
    """What sits between encoder and decoder."""
    block: BlockConfig = BlockConfig()
    mapper: MapperKind = "linear"
    """VD1 and VD2: trained in full; a frozen random matrix plus a low-rank update, as in the reference code; or a
    trained matrix plus a low-rank update."""
    mapper_rank: Positive = _MAPPER_RANK
    """Rank of the mappers' update, where they have one."""
    gate: Literal["none", "zero"] = "none"
    """`zero` multiplies the insert by a trained vector that starts at zero, so training starts at the baseline."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden width of every MLP as a multiple of its width."""
    insert_mlp_ratio: Annotated[float, Field(gt=0)] | None = None
    """The same of the MLP that insert=mlp puts in, which fits its size to another arm's; by default mlp_ratio."""
    head: Literal["linear", "upsample", "skip"] = "skip"
    """From tokens to voxels: one matrix for each token's patch; upsampling by convolutions; or that beside a
    convolutional stem, whose features are joined at each stride (a U-Net around the tokens)."""
    stem_channels: tuple[Annotated[int, Field(ge=0)], Positive, Positive] = (8, 32, 64)
    """Channels of the skip head's stem at stride 1, 2 and 4; 0 leaves the work at full resolution out, and logits
    come from stride 2."""
    join_convolutions: Annotated[int, Field(ge=1, le=4)] | None = 1
    """Convolutions at strides 4 and 2 of the skip head, where what comes up is joined by the stem's features; null
    is two where voxels are even and one where slices are thick."""
    refine: bool = False
    """Read logits off the features of stride 2, in boxes that overlap, and let full resolution add to them
    from zero at the start, instead of reading all off its few channels; without work there, nothing changes."""
    context_channels: tuple[Positive, Positive] | None = None
    """Channels of two stages of convolutions below the skip head's stem, the lower at twice the upper's stride.
    Tokens lie at the lower one and add to it; by default there are none."""
    patch_size: Positive = _PATCH_SIZE
    """Edge of a token's patch for the heads without a stem."""
    width: Positive = 192
    """Numbers in a token."""
    depth: Positive = 6
    """Transformer blocks, encoder and decoder together."""
    insert_after: Annotated[int, Field(ge=0)] = 4
    """How many of them come before the insert: 0 puts it first, `depth` last."""
    num_heads: Positive = 4
    """Attention heads of each transformer block; a divisor of width."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each MLP's output that training drops."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of attention weights that training drops."""
    positions: Literal["before_encoder", "after_insert"] = "before_encoder"
    """Where learned positions are added to the tokens; the published code adds them after its block."""

    @property
    def has_tokens(self) -> bool:
        """Whether there is a transformer."""
        return self.architecture == "tokens" and self.tokens

    @property
    def has_block(self) -> bool:
        """Whether a language model's layer is in it."""
        return self.has_tokens and self.insert == "llm"

    @model_validator(mode="after")
    def _rival_fits(self) -> "NetworkConfig":
        if self.architecture == "tokens":
            if self.base_channels is not None:
                raise ValueError("base_channels has no effect with architecture=tokens; set stem_channels")
        elif self.insert != "none" or self.tokens or self.head != "skip":
            # Else an arm would be called by a block that it does not have.
            raise ValueError(
                f"architecture={self.architecture} has no tokens and no insert; take it with --preset {self.architecture}, or set network.tokens=false, network.insert=none and network.head=skip with it"
            )
        multiple = _WIDTHS.get(self.architecture, 1)
        if (self.base_channels or multiple) % multiple:
            raise ValueError(
                f"base_channels={self.base_channels} is no multiple of {multiple}, which {self.architecture} needs"
            )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> "NetworkConfig":
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.insert_after > self.depth:
            raise ValueError(f"insert_after={self.insert_after} is more than depth={self.depth}")
        if self.width * self.mlp_ratio < 1:
            raise ValueError(
                f"mlp_ratio={self.mlp_ratio} leaves no hidden channel; width={self.width} needs at least {1 / self.width:.4g}"
            )
        if self.insert_mlp_ratio is not None and self.insert != "mlp":
            raise ValueError("insert_mlp_ratio has no effect without insert=mlp; give both")
        if self.head == "skip" and self.patch_size != _PATCH_SIZE:
            raise ValueError(
                "patch_size has no effect with head=skip, whose tokens follow data.strides; set those"
            )
        if self.head != "skip" and self.join_convolutions not in (None, 1):
            raise ValueError(f"join_convolutions has no effect with head={self.head}; set head=skip")
        if self.mapper == "linear" and self.mapper_rank != _MAPPER_RANK:
            raise ValueError("mapper_rank has no effect with mapper=linear; set mapper=lora or linear+lora")
        if self.insert_mlp_ratio is not None and self.width * self.insert_mlp_ratio < 1:
            raise ValueError(
                f"insert_mlp_ratio={self.insert_mlp_ratio} leaves the insert no hidden channel; width={self.width} needs at least {1 / self.width:.4g}"
            )
        if not self.tokens and self.head != "skip":
            raise ValueError(f"tokens=false needs head=skip, since head={self.head} has no other input")
        return self


class TrainConfig(Section):
    start_from: Path | None = None
    """Folder of an earlier run, on this dataset or another, whose best weights this run begins with: those of the
    same name and shape, outputs where the classes are the same. Nobody who trained it may validate or test here,
    and nobody who validated it may test."""
    epochs: Positive | None = None
    """Stop after so many passes over the training cases, to the nearest whole step."""
    max_steps: Positive | None = None
    """Stop after so many optimiser steps, however long they take: the limit for comparing networks step by step."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Stop training after so many minutes from the start, preprocessing and validation included. If validations
    would take a quarter of them, the last one alone is made."""
    batch_size: Positive = 2
    """Crops in a batch, shared by all processes of a run."""
    members: Annotated[int, Field(ge=1, le=16)] = 1
    """Networks that train side by side on their share of the cores, or on one GPU, each from a seed of its own; the
    mean of their probabilities predicts. Minutes hold for all of them together, epochs and steps for each."""
    accumulate: Positive = 1
    """Batches whose gradients are averaged before a step."""
    batch_threads: Annotated[int, Field(ge=0, le=64)] | None = None
    """Threads that make the next batches while this one trains; by default one for each of the run's cores beside a
    GPU, but 4 to 16, and 0 on a CPU, whose cores the network needs. The batches are the same."""
    optimizer: Literal["adam", "adamw", "muon"] = "adamw"
    """`muon` makes the update of each kernel orthogonal and leaves the rest to AdamW: more from each step."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    """At its peak, after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.02
    """Decoupled from the gradient, as in AdamW; `adam` adds it to the gradient."""
    gate_learning_rate_scale: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the insert's gate as a multiple of the others'."""
    schedule: Literal["cosine", "polynomial", "plateau", "constant"] = "cosine"
    """How the learning rate falls over a run; `plateau` halves it when validation stands still."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Steps in which it rises from zero."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients that are longer are shortened to it."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged weights that are validated and saved; 0 uses the raw weights."""
    auxiliary_weight: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the losses at stride 2 and where tokens or context come in, against 1 for the full resolution."""
    num_validations: Positive = 12
    """How often the validation cases are segmented, spread evenly over the run."""
    save_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Longest time between two saves of the resume state."""
    precision: PrecisionChoice = "auto"
    """`auto` takes bf16 where the hardware multiplies it natively, else fp32."""
    device: DeviceChoice = "auto"
    """`auto` takes a GPU if PyTorch sees one."""
    shard_block: bool = False
    """Divide the frozen block among the processes of a run (FSDP), for blocks of many layers; the rest is whole in
    each. Slower, and the same to rounding."""
    seed: Seed = 0
    """Of initial weights, order of the cases and augmentation."""

    @model_validator(mode="after")
    def _ends(self) -> "TrainConfig":
        if self.epochs is None and self.max_steps is None and self.max_minutes is None:
            raise ValueError(
                "set train.epochs, train.max_steps or train.max_minutes, or the run would never end"
            )
        return self


class InferenceConfig(Section):
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Overlap of neighbouring windows."""
    flip: bool = True
    """Average the prediction with that of the mirrored scan, along the axes that training mirrors."""
    turn: bool = False
    """Average it with those of the scan turned by 18 degrees, to the left and smaller, to the right and larger:
    about three times the time. In the plane of thick slices, else across the longest axis; not where voxels are no
    squares there, nor of a network that saw no turned crops in training."""
    largest_foreground: bool = False
    """Keep the largest connected component of all classes together, before what follows removes more. Voxels count
    by how near they lie to where training labels do, here and for each class."""
    largest_component: bool = False
    """Of each class, keep the largest connected component alone. Left false, with min_component_ml at 0, it can be
    chosen afterwards: evaluate RUN --split validation --choose-cleaning."""
    min_component_ml: Annotated[float, Field(ge=0)] = 0.0
    """Remove connected components of a class that are smaller, in millilitres."""
    tolerance_mm: Annotated[float, Field(gt=0)] = 1.0
    """Distance within which NSD counts a surface as matched."""


class Config(Section):
    """One run. Build it with `load_config`, which starts from a preset."""

    preset: str = "small"
    data: DataConfig = DataConfig()
    unlabelled: UnlabelledConfig = UnlabelledConfig()
    augment: AugmentConfig = AugmentConfig()
    network: NetworkConfig = NetworkConfig()
    train: TrainConfig = TrainConfig(max_minutes=20)
    inference: InferenceConfig = InferenceConfig()
    out: Path | None = None
    """The run folder."""

    @property
    def turns_views(self) -> bool:
        """Whether prediction looks at turned scans too: only of a network that has learned from turned crops."""
        augment = self.augment
        learned = augment.enabled and augment.spatial_probability > 0 and augment.rotation_degrees > 0
        return self.inference.turn and learned

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.data.geometry == "resize" and self.data.crop_size is None:
            raise ValueError("data.geometry=resize needs data.crop_size, the shape to resize to")
        network = self.network
        has_frozen = network.has_block and network.block.frozen
        if self.train.shard_block and not (has_frozen and network.block.weights != "identity"):
            raise ValueError(
                "train.shard_block=true has no effect without a frozen block (network.tokens, insert, block.frozen, block.weights); drop it"
            )
        if self.data.fold == "all" and self.train.schedule == "plateau":
            raise ValueError(
                "train.schedule=plateau goes by validation cases, and data.fold=all has none; give --set train.schedule=constant or another, or a fold by its number"
            )
        if self.network.head != "skip" and self.data.strides:
            raise ValueError(
                f"data.strides has no effect with network.head={self.network.head}; set network.patch_size"
            )
        if self.data.flip_axes and not (self.augment.enabled and self.augment.flip == "auto"):
            raise ValueError(
                "data.flip_axes asks for mirroring, augment.flip=none or augment.enabled=false forbids it; drop one"
            )
        if self.network.head != "skip" and self.data.crop_size:
            patch = self.network.patch_size
            if any(size % patch for size in self.data.crop_size):
                raise ValueError(
                    f"data.crop_size={self.data.crop_size} is not a multiple of network.patch_size={patch}"
                )
        return self

"""The stages of iTransformer's experiment, preset by preset: what is trained on what. A part of `itransformer`."""

from typing import Any

from jaxpapers.sequence.itransformer import ATTENTIONS

Stages = dict[str, dict[str, Any]]

# The defaults of the paper; D is that of its ETTh2 and Exchange rows.
STAGE: dict[str, Any] = {
    "data": "ETTh1",
    "model": "itransformer",
    "attention": "full",
    "factor": 3,  # of ProbSparse attention, that of the authors' first scripts for Table 2; their present ones leave 1
    "components": ("attention", "ffn"),  # on the variate axis, on the temporal axis
    "look_back": 96,
    "horizon": 96,
    "label_len": 48,  # known steps that the decoder of "vanilla" sees
    "width": 128,
    "hidden": 128,
    "num_layers": 2,
    "num_heads": 8,
    "dropout": 0.1,
    "use_norm": True,
    "marks": True,  # calendar features
    "distil": False,
    "channel_independent": False,
    "train_variates": 0,  # train on the first so many alone; 0: on all
    "subset": 0,  # train on so many of them in each batch, drawn anew; 0: on all
    "batch_size": 32,
    "epochs": 10,
    "patience": 3,
    "rate": 1e-4,
    "halving": True,  # of the rate, every epoch from the third on
    "num_seeds": 2,
    "stride": 1,  # between the windows that are scored
    "train_stride": 1,  # between those that are trained on
    "dtype": "float32",
}
VANILLA = {"model": "vanilla", "use_norm": False}
PATCHTST = {"model": "patchtst", "width": 128, "hidden": 256, "num_layers": 3, "num_heads": 16, "dropout": 0.2}
PATCHTST |= {"marks": False, "use_norm": True}
SMALL_PATCHTST = PATCHTST | {"width": 16, "hidden": 128, "num_heads": 4, "dropout": 0.3}  # on the ETT sets
# Table 3: component on the variate axis, component on the temporal axis.
ABLATIONS = (
    ("attention", "ffn"),
    ("attention", "attention"),
    ("ffn", "attention"),
    ("ffn", "ffn"),
    ("attention", "none"),
    ("none", "ffn"),
)


def stages_of(preset: str) -> Stages:
    """The stages of a preset, with all their fields.

    Args:
      preset: "smoke", "small" or "paper".
    """
    chosen = {"smoke": _smoke, "small": _small, "paper": _paper}[preset]()
    return {name: STAGE | stage for name, stage in chosen.items()}


def ablation_name(data: str, components: tuple[str, str]) -> str:
    """The stage of a row of Table 3 that is not the inverted Transformer itself."""
    return f"{data}_{'_'.join(components)}"


def promotion(name: str, fields: dict[str, Any], attentions: tuple[str, ...] = ATTENTIONS) -> Stages:
    """Table 2: every attention in the Transformer of time tokens and in the inverted one."""
    stages = {}
    for attention in attentions:
        both = fields | {"attention": attention}
        stages[f"{name}_{attention}_vanilla"] = both | VANILLA | {"distil": attention == "probsparse"}
        stages[f"{name}_{attention}_inverted"] = both
    return stages


def baselines(name: str, fields: dict[str, Any]) -> Stages:
    """Table 1: DLinear, RLinear and PatchTST on a data set and horizon.

    PatchTST's widths and dropout (its small ones on the ETT sets) and the rates of the linear ones are from their own
    papers; look-back, batch, epochs, PatchTST's rate and the halving of all rates are iTransformer's.
    """
    small = fields["data"].startswith("ETT")
    kept = ("data", "look_back", "horizon", "num_seeds", "epochs", "stride", "batch_size")
    common = {field: fields[field] for field in kept if field in fields} | {"marks": False}
    linear = common | {"rate": 5e-3 if small else 1e-3}
    return {
        f"{name}_dlinear": linear | {"model": "dlinear"},
        f"{name}_rlinear": linear | {"model": "rlinear"},
        f"{name}_patchtst": common | (SMALL_PATCHTST if small else PATCHTST),
    }


def rivals(data: str, fields: dict[str, Any]) -> Stages:
    """C1: the inverted Transformer, the vanilla one, and the vanilla one with instance normalisation."""
    return {
        f"{data}_inverted": fields,
        f"{data}_vanilla": fields | VANILLA,
        f"{data}_vanilla_norm": fields | VANILLA | {"use_norm": True},
    }


# A channel-independent Transformer makes a sample of each variate: the authors give theirs a width of 32 and 8 windows
# a batch.
ALONE = VANILLA | {"channel_independent": True, "width": 32, "hidden": 64, "batch_size": 8}


def _small() -> Stages:
    # Neighbouring windows differ in one row: every 24th is trained on, and every 16th scored, where a Transformer of
    # time steps, which takes tens of times as long as the inverted one, has to come along. Half of the authors' 32
    # windows a batch makes as many updates of half of the windows. No dropout here and below, for any model: its masks
    # are half of the compilation and a fourth of the updates, and nothing is seen often enough to be learnt by heart.
    short = {"epochs": 2, "train_stride": 24, "stride": 16, "batch_size": 16, "num_heads": 4, "dropout": 0.0}
    # The width is ours; the rate is the authors' for the sets with most variates (traffic, PEMS).
    synthetic = {"data": "synthetic", "marks": False, "stride": 192, "epochs": 4, "rate": 1e-3, "dropout": 0.0}
    synthetic |= {"width": 64, "hidden": 64, "num_heads": 4, "batch_size": 16, "train_stride": 5}
    unseen = synthetic | {"train_variates": 13, "train_stride": 12}
    # As many updates, of two windows: 26 series a batch. Heads are as wide as those of the others.
    alone = ALONE | {"num_heads": 2, "num_seeds": 1, "batch_size": 2, "train_stride": 96}
    join = {"data": "ETTh", "epochs": 3, "train_stride": 8, "stride": 4, "batch_size": 16, "dropout": 0.0}
    # Their cost is that of T^2 and there is no rule for them: small, one seed, every 32nd window.
    plain_join = join | VANILLA | {"width": 32, "hidden": 32, "num_heads": 2, "num_seeds": 1}
    plain_join |= {"train_stride": 32, "stride": 16, "num_layers": 1}
    # 19 updates an epoch: with the rate halved they would end before they have learnt anything.
    illness = {"data": "illness", "look_back": 36, "horizon": 24, "label_len": 18, "epochs": 6, "halving": False}
    illness |= {"width": 64, "hidden": 64, "num_heads": 4, "rate": 5e-4, "num_seeds": 1, "dropout": 0.0}
    illness |= {"num_layers": 1}  # their time is that of compiling; Informer does not distil: that is between layers
    etth1 = baselines("etth1", {"data": "ETTh1", "num_seeds": 3})
    etth1["etth1_patchtst"] |= {"num_seeds": 1, "epochs": 3, "train_stride": 4, "stride": 4}
    both = {**rivals("etth1", short), **rivals("exchange", short | {"data": "exchange"})}
    for data in ("etth1", "exchange"):
        both[f"{data}_vanilla_norm"] |= {"num_seeds": 1}  # no rule for it
    return {
        # Of at most 10 epochs; from the fifth on the rate is below a fourth of the first one.
        "etth1_96": {"width": 256, "hidden": 256, "num_seeds": 3, "epochs": 4},
        **etth1,
        **both,
        "etth1_none_ffn": short | {"components": ("none", "ffn")},
        "synthetic_inverted": synthetic,
        "synthetic_none_ffn": synthetic | {"components": ("none", "ffn")},
        "synthetic_dlinear": synthetic | {"model": "dlinear", "rate": 5e-3},
        "synthetic_unseen": unseen,
        "synthetic_unseen_none_ffn": unseen | {"components": ("none", "ffn")},
        "synthetic_unseen_ci": unseen | alone,
        "synthetic_subset": synthetic | {"subset": 13},
        **{f"join_look_back_{steps}": join | {"look_back": steps} for steps in (48, 96, 192, 336)},
        **{f"join_vanilla_look_back_{steps}": plain_join | {"look_back": steps} for steps in (48, 336)},
        # Full attention is compared above; "flash" is the same function, the tests hold them against each other.
        **promotion("illness", illness, tuple(name for name in ATTENTIONS if name not in ("full", "flash"))),
    }


def _smoke() -> Stages:
    tiny = {"data": "synthetic", "marks": False, "look_back": 24, "horizon": 12, "label_len": 12, "width": 16}
    tiny |= {"hidden": 16, "num_heads": 2, "batch_size": 8, "epochs": 2, "num_seeds": 1, "stride": 10, "num_layers": 1}
    deep = tiny | {"num_layers": 2}  # to have a first and a last representation; the others compile faster
    return {
        "synthetic_inverted": deep | {"num_seeds": 2},
        "synthetic_vanilla": deep | VANILLA | {"marks": True},
        "synthetic_informer": deep | VANILLA | {"attention": "probsparse", "distil": True},
        "synthetic_none_ffn": tiny | {"components": ("none", "ffn"), "train_stride": 2},
        "synthetic_unseen": tiny | {"train_variates": 3, "num_seeds": 2},
        "synthetic_unseen_none_ffn": tiny | {"train_variates": 3, "components": ("none", "ffn"), "train_stride": 2},
        "synthetic_unseen_ci": tiny | VANILLA | {"channel_independent": True, "train_variates": 3},
        "synthetic_subset": tiny | {"subset": 3, "attention": "flow", "marks": True},
        "synthetic_patchtst": tiny | {"model": "patchtst", "halving": False},
    }


# Data set -> (width, layers, rate, batch, whether calendar features are tokens).
TABLE: dict[str, tuple[int, int, float, int, bool]] = {
    "ETTh1": (256, 2, 1e-4, 32, True),
    "ETTh2": (128, 2, 1e-4, 32, True),
    "ETTm1": (128, 2, 1e-4, 32, True),
    "ETTm2": (128, 2, 1e-4, 32, True),
    "exchange": (128, 2, 1e-4, 32, True),
    "weather": (512, 3, 1e-4, 32, True),
    "electricity": (512, 3, 5e-4, 16, True),
    "traffic": (512, 4, 1e-3, 16, True),
    "solar": (512, 2, 5e-4, 32, False),
    "PEMS03": (512, 4, 1e-3, 32, False),
    "PEMS04": (1024, 4, 5e-4, 32, False),
    "PEMS07": (512, 4, 1e-3, 32, False),
    "PEMS08": (512, 4, 1e-3, 32, False),
}
HORIZONS = (96, 192, 336, 720)
PEMS_HORIZONS = (12, 24, 48, 96)


def table_row(data: str, horizon: int) -> dict[str, Any]:
    """The authors' settings of a data set and horizon."""
    width, layers, rate, batch, marks = TABLE[data]
    row: dict[str, Any] = {"data": data, "horizon": horizon, "num_layers": layers, "rate": rate, "batch_size": batch}
    row |= {"width": width, "marks": marks, "num_seeds": 1}
    near = horizon <= 24
    if data == "ETTh1" and horizon >= 336:
        row["width"] = 512
    if data in ("PEMS07", "PEMS08"):
        row |= {"num_layers": 2 if near else 4, "batch_size": 32 if near else 16}
    if data == "PEMS08":
        row |= {"rate": 1e-4 if near else 1e-3, "use_norm": near}
    if data in ("PEMS04", "PEMS07"):
        row["use_norm"] = False
    return row | {"hidden": row["width"]}


# Data sets of Table 2 (ETTh1 is ours) -> windows of a batch and epochs in the authors' scripts for it; for the rest
# these take the code's defaults. Weather has 3 epochs at S = 96 alone.
PROMOTED = {"ETTh1": (32, 10), "electricity": (32, 10), "traffic": (32, 3), "weather": (128, 10)}
DEFAULTS = {"width": 512, "hidden": 2048, "num_layers": 2, "rate": 1e-4, "batch_size": 32}
GENERALISED = {"electricity": 64, "traffic": 172, "solar": 27}  # Fig. 5: a fifth of the variates
LOOK_BACKS = (48, 96, 192, 336, 720)


def boosting_row(data: str, horizon: int) -> dict[str, Any]:
    """The authors' settings of a data set and horizon in Table 2."""
    batch, epochs = PROMOTED[data]
    epochs = 3 if (data, horizon) == ("weather", 96) else epochs
    return table_row(data, horizon) | DEFAULTS | {"batch_size": batch, "epochs": epochs}


def row_name(data: str, horizon: int) -> str:
    """The stage of a data set and horizon in the paper's settings."""
    return f"{data.lower()}_{horizon}"


def horizons_of(data: str) -> tuple[int, ...]:
    """The horizons of a data set in Table 1."""
    return PEMS_HORIZONS if data.startswith("PEMS") else HORIZONS


def _paper() -> Stages:
    stages: Stages = {}
    for data in TABLE:
        for horizon in horizons_of(data):
            name, row = row_name(data, horizon), table_row(data, horizon)
            stages |= {name: row, **baselines(name, row)}
    for data in PROMOTED:
        for horizon in HORIZONS:
            boosting = boosting_row(data, horizon)
            stages |= promotion(row_name(data, horizon), boosting)
            stages[f"{row_name(data, horizon)}_full_vanilla_norm"] = boosting | VANILLA | {"use_norm": True}
    for data, variates in GENERALISED.items():
        unseen = table_row(data, 96) | DEFAULTS | {"train_variates": variates}
        unseen |= {"rate": 5e-4} if data == "solar" else {}
        stages |= {f"{data}_unseen": unseen, f"{data}_unseen_ci": unseen | ALONE}
    for data in ("electricity", "traffic"):
        row = table_row(data, 96)
        stages[f"{data}_subset"] = row | {"subset": GENERALISED[data]}
        for steps in LOOK_BACKS:
            if steps != 96:  # that is the row of Table 1
                stages[f"{data}_look_back_{steps}"] = row | {"look_back": steps}
            stages[f"{data}_vanilla_look_back_{steps}"] = row | VANILLA | {"look_back": steps}
        for components in ABLATIONS[1:]:
            stages[ablation_name(data, components)] = row | {"components": components}
    return stages

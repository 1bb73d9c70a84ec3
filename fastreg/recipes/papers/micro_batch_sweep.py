"""How small must micro-batches be?  (Novack, Kaur, Marwah, Garg, Lipton 2022, arXiv:2211.15853)

The step of a large batch of B samples descends ``C + (weight / m) sum_k ||g_k||^2``, g_k the gradient of micro-batch k
of b samples, at a sweep of b and one weight for all, by default lr / 4. The expectation of the penalty is about
``||grad C||^2 + (variance of a sample's gradient) / b`` (derived here): as b grows, what small batches have and large
ones lack leaves it. Small- and large-batch SGD at the same rate stand beside. No momentum, no weight decay, constant
rates, equal epochs; compared is held-out accuracy at the epoch of best validation accuracy.

The digits are cut down to 256 training samples and the large batch is all of them: there the gap is wide enough to be
told apart with a few seeds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastreg.errors import FastregError
from fastreg.recipes.catalogue import Recipe
from fastreg.recipes.methods import FISHER_TRACE, GRAD_NORM, LARGE_BATCH, SMALL_BATCH, Method
from fastreg.recipes.papers._comparison import clear, comparison, measure, percent
from fastreg.recipes.papers._sweep_report import gain, mean_and_error
from fastreg.recipes.presets import MODELS
from fastreg.recipes.progress import Progress
from fastreg.recipes.settings import Settings, default_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Config:
    """Options of the recipe."""

    model: str = field(default="mlp", metadata={"help": "it fixes the data set", "choices": tuple(MODELS)})
    data_dir: str = field(default="", metadata={"help": "folder of the data; none for digits"})
    penalty: str = field(default=GRAD_NORM, metadata={"help": "which", "choices": (GRAD_NORM, FISHER_TRACE)})
    weight: float = field(default=0.075, metadata={"help": "of the penalty, the same for every b"})
    lr: float = field(default=0.3, metadata={"help": "of penalised steps"})
    large_lr: float = field(default=0.3, metadata={"help": "of large-batch SGD"})
    small_lr: float = field(default=0.3, metadata={"help": "of small-batch SGD"})
    micro_batch_sizes: tuple[int, ...] = field(default=(4, 16, 64, 256), metadata={"help": "b"})
    train_size: int = field(default=256, metadata={"help": "training samples; 0 for all"})
    small_batch_size: int = field(default=16, metadata={"help": "samples of a small-batch step"})
    batch_size: int = field(default=256, metadata={"help": "B, samples of a large-batch step"})
    epochs: int = field(default=400, metadata={"help": "passes over the training samples"})
    seeds: int = field(default=10, metadata={"help": "runs of every method"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda[:N]"})


def paper_scale() -> Config:
    """VGG-11 on CIFAR-10 with the paper's rates and micro-batches.

    One weight, the paper's at three of its four b (it has 0.5 at b = 100). B = 5000, which all b divide, and small
    batches of 100 are inferred from those sizes.
    """
    return Config(
        "vgg11", "cifar-10-batches-py", weight=0.25, lr=0.01, large_lr=0.01, small_lr=0.15,
        micro_batch_sizes=(50, 100, 1000, 2500), train_size=0, small_batch_size=100, batch_size=5000,
        epochs=150, seeds=3, device="cuda",
    )  # fmt: skip


def cases(config: Config) -> list[tuple[Settings, Method]]:
    """Small batch, large batch, then the penalty at every b.

    Example:
        >>> [settings.micro_batch_size for settings, _ in cases(Config())]
        [16, 16, 4, 16, 64, 256]
    """
    if config.seeds < 1 or not config.micro_batch_sizes or config.train_size < 0:
        given = f"{config.seeds}, {len(config.micro_batch_sizes)} and {config.train_size}"
        raise FastregError(
            "micro-batch-sweep: seeds, the number of micro_batch_sizes and train_size must be at least 1, 1 and 0, "
            f"got {given}"
        )
    plain = [Method(SMALL_BATCH, config.small_lr), Method(LARGE_BATCH, config.large_lr)]
    penalised = Method(config.penalty, config.lr, config.weight)
    chosen = [(config.small_batch_size, method) for method in plain]
    chosen += [(size, penalised) for size in config.micro_batch_sizes]
    return [(_settings(config, size, method), method) for size, method in chosen]


def _settings(config: Config, micro_batch_size: int, method: Method) -> Settings:
    return replace(
        default_settings(MODELS[config.model].data, config.model),
        methods=(method,),
        seeds=tuple(range(config.seeds)),
        epochs=config.epochs,
        batch_size=config.batch_size,
        chunk_size=config.batch_size,
        micro_batch_size=micro_batch_size,
        measure_every=config.epochs,
        device=config.device,
    )


def run(config: Config, progress: Progress) -> dict[str, Any]:
    """One row per case."""
    return {"rows": measure(cases(config), config.data_dir, progress, config.train_size or None)}


def table(result: dict[str, Any]) -> str:
    """Accuracies against b, what each recovers of the gap, and whether the benefit vanishes as b grows."""
    small, large, *swept = result["rows"]
    return f"{comparison(result['rows'], small, large)}\n\n{_verdict(small, large, swept)}"


def _verdict(small: dict[str, Any], large: dict[str, Any], swept: list[dict[str, Any]]) -> str:
    fine, coarse = (choose(swept, key=lambda row: row["micro_batch_size"]) for choose in (min, max))
    benefit, loss = gain(fine, large, "accuracy"), gain(fine, coarse, "accuracy")
    word = "seen" if clear(benefit) and clear(loss) else "opposite" if clear((-loss[0], loss[1])) else "not seen"
    return (
        f"small - large batch: {percent(gain(small, large, 'accuracy'), signed=True)} points; the penalty adds "
        f"{percent(benefit, signed=True)} at b = {fine['micro_batch_size']}, {percent(loss, signed=True)} more than at "
        f"b = {coarse['micro_batch_size']}:\nthat it helps and ceases to as b grows is {word} "
        "(differences beyond twice their standard errors)"
    )


def draw(figure: Figure, result: dict[str, Any]) -> None:
    """Accuracy against b, with the levels of small and large batches."""
    axes = figure.subplots()
    plain, swept = result["rows"][:2], result["rows"][2:]
    found = [mean_and_error(row["accuracy"]) for row in swept]
    sizes = [row["micro_batch_size"] for row in swept]
    means, errors = ([100 * pair[place] for pair in found] for place in (0, 1))
    axes.errorbar(sizes, means, errors, fmt="o-", capsize=4, label=swept[0]["title"])
    for place, row in enumerate(plain, 1):
        level, error = mean_and_error(row["accuracy"])
        axes.axhline(100 * level, color=f"C{place}", label=row["title"])
        axes.axhspan(100 * (level - error), 100 * (level + error), color=f"C{place}", alpha=0.15)
    axes.set(xscale="log", xlabel="b, samples of a micro-batch", ylabel="held-out accuracy, %")
    axes.legend()


RECIPE = Recipe(
    name="micro-batch-sweep",
    paper="Novack, Kaur, Marwah, Garg, Lipton 2022, arXiv:2211.15853",
    claim="The benefit of penalising the gradients of micro-batches vanishes as the micro-batches grow.",
    config=Config,
    quick=Config(micro_batch_sizes=(16, 256), epochs=4, seeds=2),
    steps=lambda config: (2 + len(config.micro_batch_sizes)) * config.seeds * config.epochs,
    run=run,
    table=table,
    draw=draw,
    presets=(("paper", paper_scale()),),
)

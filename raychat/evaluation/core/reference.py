"""What the GPT-2 family scores on CORE, as published with the lineage's bundle: for the table beside our own figures.

The 124M figures are over all items, the others, judging by their fractions, over up to 1,000 items a task. Figures over
fewer items are not comparable: one standard error at 100 items is up to 5 points of accuracy.
"""

from dataclasses import dataclass

MODELS = ("GPT-2 124M", "GPT-2 355M", "GPT-2 774M", "GPT-2 1558M")
CORE_METRIC = dict(zip(MODELS, (0.113891, 0.184903, 0.214641, 0.256525), strict=True))


@dataclass(frozen=True)
class Reference:
    """Published accuracies on one task, in the order of MODELS, and the accuracy of guessing."""

    baseline: float
    accuracy: tuple[float, float, float, float]

    @property
    def centered(self) -> tuple[float, ...]:
        """The accuracies with guessing at 0 and all right at 1."""
        return tuple((accuracy - self.baseline) / (1 - self.baseline) for accuracy in self.accuracy)


GPT2 = {
    "hellaswag_zeroshot": Reference(0.25, (0.3085, 0.3900, 0.4400, 0.5020)),
    "jeopardy": Reference(0, (0.0019, 0.0440, 0.0450, 0.0920)),
    "bigbench_qa_wikidata": Reference(0, (0.2827, 0.4280, 0.4800, 0.5310)),
    "arc_easy": Reference(0.25, (0.4125, 0.4800, 0.5350, 0.5950)),
    "arc_challenge": Reference(0.25, (0.2218, 0.2620, 0.2640, 0.2990)),
    "copa": Reference(0.5, (0.6000, 0.6600, 0.6700, 0.6700)),
    "commonsense_qa": Reference(0.2, (0.2244, 0.1960, 0.2700, 0.2270)),
    "piqa": Reference(0.5, (0.6230, 0.6700, 0.6980, 0.7250)),
    "openbook_qa": Reference(0.25, (0.2780, 0.3080, 0.3180, 0.3460)),
    "lambada_openai": Reference(0, (0.3229, 0.4260, 0.4880, 0.5230)),
    "hellaswag": Reference(0.25, (0.3079, 0.3950, 0.4440, 0.5120)),
    "winograd": Reference(0.5, (0.5788, 0.6557, 0.6886, 0.7143)),
    "winogrande": Reference(0.5, (0.4862, 0.5210, 0.5410, 0.5690)),
    "bigbench_dyck_languages": Reference(0, (0.1550, 0.1700, 0.2250, 0.2470)),
    "agi_eval_lsat_ar": Reference(0.2, (0.2261, 0.2304, 0.2565, 0.2739)),
    "bigbench_cs_algorithms": Reference(0, (0.4197, 0.4560, 0.4400, 0.4170)),
    "bigbench_operators": Reference(0, (0.0857, 0.1000, 0.1143, 0.1571)),
    "bigbench_repeat_copy_logic": Reference(0, (0.0312, 0.0625, 0.0625, 0.0938)),
    "squad": Reference(0, (0.0583, 0.1690, 0.2350, 0.3090)),
    "coqa": Reference(0, (0.1337, 0.2270, 0.2300, 0.2800)),
    "boolq": Reference(0.62, (0.5523, 0.6060, 0.5670, 0.6190)),
    "bigbench_language_identification": Reference(0.091, (0.2566, 0.2690, 0.2610, 0.2500)),
}

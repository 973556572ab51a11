"""The commands, and the options that each alone takes."""

from collections.abc import Mapping

from scalefl.config.calibrateoptions import CalibrateOptions
from scalefl.config.clientoptions import ClientOptions
from scalefl.config.convertoptions import ConvertOptions
from scalefl.config.exportoptions import ExportOptions
from scalefl.config.own import OwnOptions
from scalefl.config.planoptions import PlanOptions
from scalefl.config.predictoptions import PredictOptions
from scalefl.config.reorderoptions import ReorderOptions
from scalefl.config.serveoptions import ServeOptions

OWN_OPTIONS: Mapping[str, type[OwnOptions]] = {
    "plan": PlanOptions,
    "client": ClientOptions,
    "convert": ConvertOptions,
    "export": ExportOptions,
    "predict": PredictOptions,
    "serve": ServeOptions,
    "calibrate": CalibrateOptions,
    "reorder": ReorderOptions,
}
"""Command -> the options that it alone takes."""

COMMANDS = {
    "train": "train, or resume a run",
    "evaluate": "evaluate a checkpoint again",
    "plan": "predict each level's cost and memory, assign levels",
    "client": "train tasks that a run wrote to files",
    "convert": "turn released weights into a model folder",
    "export": "write a level of a checkpoint as a model of its own",
    "predict": "ask a model about images",
    "serve": "ask a model about radiographs on a web page",
    "calibrate": "choose how sure an exit must be to answer",
    "reorder": "permute a model so that its prefixes hold what matters most",
}
"""Command -> what it does."""

OF_A_RUN = ("train", "evaluate", "plan", "calibrate", "reorder")
"""Commands that take a run's options."""

ONE_PROCESS = ("convert", "export", "predict", "serve", "calibrate", "reorder")
"""Commands that a launcher of several processes may not start."""

import copy
import dataclasses
import fractions
import inspect
import json
import math
import pickle
import pydoc
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import beartype
import jaxtyping
import numpy as np
import pytest
import torch

import besa
from besa.machine.fields import checked, documented
from besa.paper import records
from besa.prune import Method

if TYPE_CHECKING:
    from nowhere import Thing

NAN, INF = math.nan, math.inf
HUGE, HALF = 10**400, fractions.Fraction(1, 2)
NUMBER, COUNT, FRACTION = "a finite number > 0 and <= 1000000.0", "an integer >= 1", "a finite number >= 0 and < 1"
SEED = f"an integer >= {-(2**63)} and < {2**64}"
NO_NUMBERS = [NAN, INF, -INF, "0.5", True, 1j, HUGE, HALF, [0.5], np.longdouble(0.5), torch.tensor(0.5)]
NO_COUNTS = [0, -1, 2.0, 2.5, NAN, "2", True, [2], np.float64(2.0), np.array(2)]
REFUSED = [  # class, field, values, what it may be
    (besa.Wanda, "sparsity", [*NO_NUMBERS, None, 1, 1.0, -0.1], FRACTION),
    (besa.Besa, "penalty", [*NO_NUMBERS, None, 0, 0.0, -1.0], NUMBER),
    (besa.Besa, "d_coef", [INF, NAN, 0, "5", 1.7e22], NUMBER),
    (besa.Besa, "lr", [INF, NAN, 0, False], NUMBER),
    (besa.SparseGPT, "damping", [INF, NAN, 0.0, "0.01"], NUMBER),
    (besa.Quantize, "lr", [INF, NAN, 0.0, True], NUMBER),
    (besa.Reconstruct, "rho", [INF, NAN, 0.0, 3e38], NUMBER),
    (besa.Reconstruct, "damping", [INF, NAN, 0.0], NUMBER),
    (besa.Reconstruct, "lr", [INF, NAN, 0.0], NUMBER),
    (besa.FineTune, "alpha", [INF, NAN, -1.0], NUMBER),
    (besa.FineTune, "lr", [INF, NAN, 0.0], f"{NUMBER} or None"),
    (besa.Besa, "epochs", [*NO_COUNTS, None], COUNT),
    (besa.Besa, "batch_size", [0, 2.5, True, None], COUNT),
    (besa.Besa, "candidates", [1, 300, 101.0, True, "101"], "an integer >= 2 and <= 256"),
    (besa.SparseGPT, "block_columns", [0, 128.0], COUNT),
    (besa.Quantize, "group_size", [0, 64.0, "64", True], f"{COUNT} or None"),
    (besa.Reconstruct, "iterations", [0, 2.5], COUNT),
    (besa.Reconstruct, "epochs", [0, True], COUNT),
    (besa.FineTune, "rank", [0, 16.0], COUNT),
    (besa.FineTune, "epochs", [0, 1.5], COUNT),
    (besa.FineTune, "batch_size", [0, "4"], COUNT),
    (besa.FineTune, "patience", [0, None], COUNT),
    (besa.Besa, "seed", [0.5, "0", True, 2**64], f"{SEED} or None"),
    (besa.FineTune, "seed", [None, NAN, 2**64], SEED),
    (besa.Reconstruct, "toward_dense", [NAN, 1.5, -0.1, "1"], "a finite number >= 0 and <= 1"),
    (besa.Reconstruct, "held_out", [NAN, 0.0, 1.0], "a finite number > 0 and < 1"),
    (besa.FineTune, "distill", [NAN, 1.5, True], "a finite number >= 0 and <= 1"),
    (besa.FineTune, "held_out", [NAN, 1.0, "1"], "a finite number > 0 and < 1"),
    (besa.Besa, "row_group", ["column", 0, 2.0, True, None, ("row",)], f"'row', 'layer' or {COUNT}"),
    (besa.Besa, "reconstruct", ["layer", 0, 2.0, True, None], f"'projection', 'sublayer' or {COUNT}"),
    (besa.Besa, "targets", ["both", "", 0, ["dense"]], "'pruned', 'dense' or None"),
    (besa.Besa, "importance", ["random", None, 1], "'magnitude', 'wanda' or 'sparsegpt'"),
    (besa.Besa, "smooth", [0, 1, "no", None, NAN], "True or False"),
    (besa.Besa, "scores", [0, "yes"], "True or False or None"),
    (besa.Besa, "budget", ["loose", None], "'penalty' or 'exact'"),
    (besa.Besa, "scope", ["world", 1], "'block' or 'model'"),
    (besa.Besa, "loss", ["plain", 0], "'channel', 'token' or None"),
    (besa.Besa, "quantize", [4, True, {"bits": 4}, besa.Quantize], "besa.Quantize(bits=4) or None"),
    (besa.Quantize, "bits", [5, 4.0, "4", True, None], "2, 3, 4 or 8"),
    (besa.Reconstruct, "kind", ["open", None, 0], "'closed' or 'block'"),
    (besa.FineTune, "kind", ["lora", True], "'low-rank' or 'full'"),
    (besa.Wanda, "pattern", [24, 2.4, b"2:4", ("2:4",)], "a string or None"),
    (besa.Wanda, "ignore", ["0.mlp", None, 3, {"0.mlp"}, np.array(["0"])], "a tuple or list, each entry a string"),
    (besa.Wanda, "sparsities", [0.5, [0.5, 0.5], "0.5", np.array([0.5])], f"a tuple, each entry {FRACTION} or None"),
    (records.Recipe, "n_samples", [0, 2.5, True, "8"], f"{COUNT} or None"),
    (records.Recipe, "seq_len", [0, 64.0], f"{COUNT} or None"),
    (records.Recipe, "seed", [1.5, "1", None], "an integer"),
    (records.Recipe, "dtype", ["int8", 16], "'bfloat16', 'float16', 'float32' or None"),
    (records.Recipe, "d_coef", ["5e-1", NAN, True], NUMBER),
    (records.Recipe, "sampler", ["slide", None], "'crop' or 'pack'"),
    (records.Recipe, "calibration", [4, None], "a string"),
]
CASES = [pytest.param(cls, name, value, words) for cls, name, values, words in REFUSED for value in values]


@pytest.mark.parametrize("cls, name, value, words", CASES)
def test_what_is_no_value_of_a_field_is_refused_in_a_sentence(no_type_checks, cls, name, value, words):
    with pytest.raises(ValueError) as error:
        cls(**{name: value})
    message = str(error.value)
    assert type(error.value) is ValueError and message.startswith(f"{name} ") and message.endswith(f" is not {words}")
    assert "\n" not in message and len(message) < 300
    assert repr(value)[:20] in message or isinstance(value, np.generic | torch.Tensor | type)


def test_each_wrong_field_has_a_sentence_and_a_wrong_entry_is_named(no_type_checks):
    with pytest.raises(ValueError, match=r"^penalty nan is not .* <= 1000000.0; epochs 2.5 is not an integer >= 1$"):
        besa.Besa(penalty=NAN, epochs=2.5)
    with pytest.raises(ValueError, match=r"^sparsities with 1.5 is not a tuple, each entry a finite number"):
        besa.Wanda(sparsities=(0.5,) * 79 + (1.5,))
    with pytest.raises(ValueError, match=r"^ignore with 3 is not a tuple or list, each entry a string$"):
        besa.Wanda(ignore=["0.mlp", 3])
    with pytest.raises(ValueError, match="pattern '' is not 'N:M'"):
        besa.Wanda(pattern="")


def test_numpys_scalars_become_the_numbers_that_they_are(no_type_checks):
    fields = {"sparsity": np.float32(0.5), "penalty": np.float64(2.5), "epochs": np.int64(2), "smooth": np.bool_(True)}
    fields |= {"row_group": np.int32(8), "reconstruct": np.int64(2), "targets": np.str_("dense")}
    method = besa.Besa(**fields)
    plain = besa.Besa(sparsity=0.5, penalty=2.5, epochs=2, row_group=8, reconstruct=2, targets="dense")
    assert method == plain and hash(method) == hash(plain) and repr(method) == repr(plain) and method.span == 2
    given = besa.Wanda(sparsities=tuple(np.linspace(0.25, 0.75, 3)))
    assert repr(given.sparsities) == "(0.25, 0.5, 0.75)" and given.config()["sparsities"] == [0.25, 0.5, 0.75]
    assert repr(besa.Besa(penalty=5).penalty) == "5"  # what is a number stays as it was given


JOINT = besa.Quantize(bits=3)
CONFIGURATIONS = [  # with the identifiers of their records from before the fields were checked
    (besa.Besa, {}, "4b8bdbf50b1c"),
    (
        besa.Besa,
        {"targets": "dense", "row_group": "layer", "d_coef": 50, "quantize": besa.Quantize(bits=3)},
        "d600b8567060",
    ),
    (besa.Besa, {"budget": "exact", "pattern": "N:8", "ignore": ["0"]}, "d0fae2ebca1e"),
    (besa.SparseGPT, {"pattern": "2:4"}, "3dda1cb6a999"),
    (besa.Wanda, {"sparsities": (0.25, 0.5)}, "20195cd4537d"),
    (besa.Reconstruct, {"kind": "block", "lr": 1e-3}, "5ec3f49ac991"),
    (besa.FineTune, {"kind": "full"}, "92aba7ee5eba"),
]


@pytest.mark.parametrize("cls, fields, identifier", CONFIGURATIONS)
def test_configurations_are_copied_compared_and_recorded_as_before(no_type_checks, cls, fields, identifier):
    configuration = cls(**fields)
    pickled = lambda value: pickle.loads(pickle.dumps(value))
    for twin in [copied(configuration) for copied in (copy.deepcopy, pickled, dataclasses.replace)]:
        assert twin == configuration and hash(twin) == hash(configuration) and twin is not configuration
    assert records.config_hash(configuration.config()) == identifier
    assert json.loads(json.dumps(configuration.config())) == configuration.config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        configuration.lr = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(Method):
    """As CONTRIBUTING.md shows it, with fields of any kind."""

    name: ClassVar[str] = "own"
    tries: int = 1
    limit: float = INF
    order: Iterable[int] = ()
    keep: jaxtyping.Bool[torch.Tensor, "rows columns"] | None = None
    thing: "object | None" = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreign(Method):
    """With an annotation that only type checkers can read."""

    name: ClassVar[str] = "foreign"
    thing: "Thing | None" = None


def test_fields_of_derived_methods_are_checked_too():
    assert Own().limit == INF  # its class's own business
    assert Own(keep=torch.ones(2, 3) > 0, thing=object, order=[1], tries=2).tries == 2
    for fields, message in (
        ({"sparsity": NAN}, f"sparsity nan is not {FRACTION}"),
        ({"tries": 2.5}, "tries 2.5 is not an integer"),
        ({"limit": NAN}, "limit nan is not a finite number"),
        (
            {"keep": torch.ones(3)},
            "keep of torch.float32 (3,) is not a bool tensor (rows, columns), True = keep or None",
        ),
    ):
        with pytest.raises(ValueError) as error:
            Own(**fields)
        assert str(error.value) == message
    assert Foreign(thing=3).thing == 3
    with pytest.raises(ValueError, match="sparsity nan"):
        Foreign(sparsity=NAN)


FUNCTIONS = [getattr(besa, name) for name in besa.__all__ if inspect.isroutine(getattr(besa, name))]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_argument_of_a_public_function_is_checked(function):
    given = dict.fromkeys(inspect.signature(function).parameters, stranger := object())
    with pytest.raises(ValueError) as error:
        function(**given)
    sentences = str(error.value).split("; ")
    assert [sentence.partition(f" {stranger!r} is not ")[0] for sentence in sentences] == list(given)
    assert all(sentence.partition(" is not ")[2] for sentence in sentences)


MODEL, WINDOWS = "a model as besa.load_model gives it", "int64 token ids (n_samples, seq_len) as besa.calib"
MASKS = "keep-masks {(block, projection)"
ARGUMENTS = [  # function, argument, values, what it may be
    (besa.load_model, "name", [None, 7, b"llama-7b"], "a string or a Path"),
    (besa.load_model, "dtype", [16, torch.zeros(1)], "a torch.dtype, a string or None"),
    (besa.load_model, "device", [0, None], "a string"),
    (besa.load_model, "packed", [0, "no"], "True or False"),
    (besa.load_model, "trust_remote_code", [1, None], "True or False"),
    (besa.calibration_windows, "n_samples", [2.5, "2", True, None, np.float64(2)], "an integer"),
    (besa.calibration_windows, "seq_len", [64.0, None], "an integer"),
    (besa.calibration_windows, "seed", [0.5, None], "an integer"),
    (besa.calibration_windows, "sampler", ["slide", None], "'crop' or 'pack'"),
    (besa.calibration_windows, "tokenizer", ["llama-7b", len], "a tokenizer as besa.load_model gives it"),
    (besa.test_tokens, "name", [None, ["wiki"]], "a string"),
    (besa.prune, "model", ["llama-7b", (1, 2), torch.nn.Linear(1, 1)], MODEL),
    (besa.prune, "windows", ["sotu", [[1, 2]], torch.ones(2, 3), torch.ones(3, dtype=int), np.ones((2, 3))], WINDOWS),
    (besa.prune, "method", ["besa", besa.Besa, None], "a method: besa.Besa(), Wanda(), SparseGPT() or Magnitude()"),
    (besa.prune, "progress", [1, "yes"], "True or False"),
    (besa.prune, "reconstruct", ["closed", True], "besa.Reconstruct('closed') or ('block') or None"),
    (besa.prune_checkpoint, "source", [None, 3], "a string or a Path"),
    (besa.prune_checkpoint, "hidden_states", ["disk", None], "'device', 'host', 'file' or 'auto'"),
    (besa.plan_checkpoint, "windows", [torch.ones(2, 3)], WINDOWS),
    (besa.finetune, "report", [None, torch.ones(2, 3), {"a": 1}], f"what besa.prune returned or {MASKS}"),
    (besa.finetune, "config", ["full", {}], "besa.FineTune('low-rank') or ('full') or None"),
    (besa.finetune, "checkpoint", [3], "a Path, a string or None"),
    (besa.perplexity, "tokens", ["wiki", [1, 2], torch.ones(9), torch.ones(2, 3) > 0], "int64 token ids (n_tokens,)"),
    (besa.perplexity, "seq_len", [16.0, "16", True, None], "an integer"),
    (besa.zero_shot, "tasks", ["piqa", None, 3], "a tuple or list, each entry a string"),
    (besa.zero_shot, "limit", ["10", 2.5, True], "an integer or None"),
    (besa.zero_shot, "batch_size", ["big", 1.5, None], "an integer or 'auto'"),
    (besa.simulate_cycles, "keep_mask", [None, torch.ones(3, 4), torch.ones(3) > 0], "a bool tensor (rows, columns)"),
    (besa.pack, "report", ["report", 3], f"what besa.prune returned, {MASKS}"),
    (besa.save_packed, "folder", [None], "a string or a Path"),
    (records.Run, "model", [None, 7], "a string"),
    (records.Run, "recipe", ["d_coef", 2], "a dict or None"),
    (records.Run, "shorter", [1.5], "an integer"),
]


@pytest.mark.parametrize(
    "function, name, value, words",
    [(function, name, value, words) for function, name, values, words in ARGUMENTS for value in values],
)
def test_what_is_no_argument_is_refused_in_a_sentence(function, name, value, words):
    parameters = inspect.signature(function).parameters.values()
    needed = [each.name for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
    with pytest.raises(ValueError) as error:
        function(**dict.fromkeys(needed, object()) | {name: value})
    (sentence,) = [each for each in str(error.value).split("; ") if each.startswith(f"{name} ")]
    assert f" is not {words}" in sentence and "\n" not in sentence and len(sentence) < 300


@checked
def counted(n: int, name: Path | str = "") -> tuple[int, type]:
    return n, type(n)


def test_what_is_admitted_comes_through_and_missing_arguments_are_pythons_own_error():
    assert counted(np.int64(3)) == counted(n=3) == (3, int) and counted.__name__ == "counted"
    for arguments, message in (((), "'n'"), ((1, "", 2), "too many"), ((1,), "'size'")):
        with pytest.raises(TypeError, match=message):
            counted(*arguments, **{"size": 1} if "size" in message else {})


def test_axes_are_not_those_of_a_callers_own_annotations():
    @jaxtyping.jaxtyped(typechecker=beartype.beartype)
    def both(keep_mask: jaxtyping.Bool[torch.Tensor, "rows columns"]) -> int:
        return besa.simulate_cycles(keep_mask).cycles + besa.simulate_cycles(keep_mask[:, :64]).cycles

    assert both(torch.ones(64, 128, dtype=torch.bool)) == 3 * 64 * 64 // 4096


@dataclasses.dataclass(kw_only=True)
class Base:
    size: int = 3
    """Of the base, in metres."""


@documented
@dataclasses.dataclass(kw_only=True)
class Derived(Base):
    """What it is.

    More of it.
    """

    colour: str
    """What it looks like, in words that
    go over two lines."""
    silent: bool = False
    kind = "no field"
    """Of the class."""


def test_a_docstring_lists_the_fields_its_bases_too_with_the_text_below_each():
    assert Derived.__doc__ == (
        "What it is.\n\nMore of it.\n\nArgs:\n"
        "    size: Of the base, in metres.\n"
        "    colour: What it looks like, in words that go over two lines."
    )


def test_help_shows_every_field_of_a_configuration_with_its_meaning():
    shown = pydoc.plain(pydoc.render_doc(besa.Quantize))
    for field in dataclasses.fields(besa.Quantize):
        assert f" {field.name}: " in shown
    assert "Columns that share a scale and a zero-point; None: a whole row (per channel)." in shown
    assert inspect.getdoc(besa.Quantize) == besa.Quantize.__doc__  # what Jupyter's `?` asks for


def test_without_source_the_docstring_stays(monkeypatch):
    monkeypatch.setattr(inspect, "getsource", lambda cls: (_ for _ in ()).throw(OSError("no source")))

    @documented
    @dataclasses.dataclass
    class Alone:
        """What it is."""

        size: int = 3
        """Lost."""

    assert Alone.__doc__ == "What it is."

"""The hub, tried: a small one on loopback has the paper's models and texts under their names, and fails as it does.

It answers as huggingface.co does: routes and headers as huggingface_hub asks for them
(https://huggingface.co/docs/hub/api), files and columns as the datasets' cards name them (`text` in
Salesforce/wikitext, `sentence` in ptb_text_only, lines of `text`, `timestamp` and `url` in allenai/c4), revisions
such as `refs/convert/parquet`, where the hub keeps what once had a loading script
(https://huggingface.co/docs/dataset-viewer/parquet). The texts are made up; nobody here could ask the real one.
"""

import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
LLAMA, LLAMA2 = "huggyllama/llama-7b", "meta-llama/Llama-2-7b-hf"
WIKITEXT, C4, PTB = "datasets/Salesforce/wikitext", "datasets/allenai/c4", "datasets/ptb-text-only/ptb_text_only"
REVISIONS = {  # the commit, and what it is called
    LLAMA: ("4782ad278652c7c71b72204d462d6d01eaaf7549", "main"),
    LLAMA2: ("01c7f73d771dfac7d292323805ebc428287df4f9", "main"),
    WIKITEXT: ("b08601e04326c79dfdd32d625aee71d232d685c3", "main"),
    C4: ("1588ec454efa1a09f29cd18ddd04fe05fc8653a2", "main"),
    PTB: ("c" * 40, "refs/convert/parquet"),
}
draw = random.Random(0)
WORDS = [a + b for a in ("ba", "ce", "di", "fo") for b in ("lan", "mer", "nos", "pit", "rud")]


def sentences(n, length, end):
    return [" ".join(draw.choices(WORDS, k=length)) + end for _ in range(n)]


TEXTS = {  # repository -> file -> documents
    WIKITEXT: {
        "wikitext-2-raw-v1/train-00000-of-00001.parquet": ["", *sentences(30, 30, " \n"), ""],
        "wikitext-2-raw-v1/test-00000-of-00001.parquet": ["", " = Ba lan = \n", *sentences(30, 12, " \n")],
    },
    C4: {
        "en/c4-train.00000-of-01024.json.gz": sentences(20, 120, ".\nMer nos."),
        "en/c4-validation.00000-of-00008.json.gz": sentences(1105, 4, "."),
    },
    PTB: {
        "penn_treebank/train/0000.parquet": sentences(30, 30, " <unk> N"),
        "penn_treebank/test/0000.parquet": sentences(30, 12, " <unk> N"),
    },
}


def encoded(repository, documents):
    """A file of the hub, which has more columns than one in C4."""
    if repository == C4:
        rows = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.org"} for text in documents]
        return gzip.compress("\n".join(map(json.dumps, rows)).encode())
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"sentence" if repository == PTB else "text": documents}), buffer)
    return buffer.getvalue()


def llama_files(folder, **settings):
    """A tiny Llama in shards, and a tokenizer in Llama's manner, as the hub's repositories have them; and a pickle."""
    steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = tokenizers.normalizers.Sequence(steps)
    special = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    backend.train_from_iterator([f" {word}." for word in WORDS], trainer)
    content = json.loads(backend.to_str())
    content["model"]["vocab"] |= {f"<0x{byte:02X}>": backend.get_vocab_size() + byte for byte in range(256)}
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=backend.get_vocab_size(), **shape))
    model.save_pretrained(folder, max_shard_size="20KB")
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"pytorch_model.bin": b"nobody asks for it"}


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log_message = lambda *_: None

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0]).strip("/")
        self.server.asked.append(path)
        trouble = next((next(kinds, None) for key, kinds in self.server.trouble.items() if re.search(key, path)), None)
        if isinstance(trouble, tuple):
            return self.refuse(*trouble)
        if path.startswith("cdn/"):
            return self.send_part(self.server.large[path.split("/")[1]], cut=trouble == "cut")
        path = path.removeprefix("api/").removeprefix("models/")
        repository = next((name for name in self.server.files if f"{path}/".startswith(f"{name}/")), None)
        if not repository:
            return self.refuse(401, "", "Invalid username or password.")
        what, _, rest = path[len(repository) + 1 :].partition("/")
        revision = next((name for name in REVISIONS[repository] if f"{rest}/".startswith(f"{name}/")), None)
        if rest and not revision:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        commit, files = REVISIONS[repository][0], self.server.files[repository]
        if what == "resolve":
            return self.resolve(files, rest[len(revision) + 1 :], commit)
        entries = [{"type": "file", "path": name, "oid": "0" * 40, "size": len(files[name])} for name in files]
        about = {"id": repository.removeprefix("datasets/"), "sha": commit}
        return self.send(200, json.dumps(entries if what == "tree" else about).encode())

    do_HEAD = do_GET

    def resolve(self, files, name, commit):
        """Small files come from here, large ones from another host."""
        if name not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        total = hashlib.sha256(files[name]).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{total[:40]}"'}
        if name.endswith(".json"):
            return self.send(200, files[name], **headers)
        self.server.large[total] = files[name]
        headers |= {"X-Linked-ETag": f'"{total}"', "X-Linked-Size": str(len(files[name]))}
        return self.send(302, b"", Location=f"http://localhost:{self.server.server_port}/cdn/{total}/{name}", **headers)

    def send_part(self, content, cut):
        start = int(re.findall(r"\d+", self.headers.get("Range", "bytes=0-"))[0])
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.send(206 if start else 200, content[start:], max(0, len(content) // 2 - start) if cut else None, **headers)
        self.close_connection = cut

    def refuse(self, status, code, message, **headers):
        headers |= {"X-Error-Code": code} if code else {}
        self.send(status, json.dumps({"error": message}).encode(), **headers, **{"X-Error-Message": message})

    def send(self, status, body, until=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:until])


SESSION = """
import json, os, sys, time, traceback
import datasets, transformers
import besa, besa.__main__, besa.checkpoint.run
for line in sys.stdin:
    if (child := os.fork()) == 0:
        waits, sleep = [], time.sleep
        time.sleep = lambda seconds: (waits.append(seconds), sleep(min(seconds, 0.01)))
        for stream in (1, 2):
            os.dup2(os.open(str(stream), os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
        try:
            status = exec(json.loads(line)) or 0
        except SystemExit as asked:
            status = asked.code
        except BaseException:
            status = traceback.print_exc() or 99
        sys.stdout.flush(), sys.stderr.flush(), open("waited", "w").write(str(sum(waits)))
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Session:
    """Runs code, each piece as if in a process of its own that has imported all; who waits, does not wait long."""

    def __init__(self, folder, **where):
        self.folder, self.home = folder, folder / "home"
        own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "BESA_"))}
        own |= {"HF_HOME": str(self.home), "PYTHONPATH": str(ROOT), "BESA_RESULTS": str(folder), "MPLBACKEND": "agg"}
        own |= {"NO_PROXY": "*", "no_proxy": "*"}  # the hub is on this machine
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", SESSION], cwd=folder, env=own | where, **pipes)

    def run(self, code, status=0):
        """What it prints, on either stream, if it ends with this status."""
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        ended, output, errors = self.process.stdout.readline(), *((self.folder / name).read_text() for name in "12")
        assert int(ended) == status, errors
        return output, errors

    def besa(self, command, status=0):
        return self.run(f"besa.__main__.app({command.split()!r})", status)

    def is_refused(self, command, words):
        """In one sentence, soon, and with nothing half-written."""
        errors = self.besa(command, status=1)[1]
        said = rf"^besa: (cannot load the model|the text) .*the hub did not deliver it: .*{words}"
        assert re.search(said, errors.splitlines()[-1]) and "Traceback" not in errors, errors
        assert not list(self.home.rglob("*.incomplete")) and not (self.folder / "out").exists()
        return float((self.folder / "waited").read_text()) < 60


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def hub(llama, tmp_path_factory):
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    texts = {kind: {name: encoded(kind, texts[name]) for name in texts} for kind, texts in TEXTS.items()}
    hub.files = texts | {LLAMA: llama_files(llama), LLAMA2: llama_files(tmp_path_factory.mktemp("two"), legacy=False)}
    hub.large = {}
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(autouse=True)
def as_ever(hub):
    hub.asked, hub.trouble = [], {}


@pytest.fixture(scope="module")
def session(hub, tmp_path_factory):
    session = Session(tmp_path_factory.mktemp("session"), HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    yield session
    session.process.kill(), session.process.wait()


def test_a_paper_model_comes_by_its_name_whole_and_without_pickles(hub, session, llama):
    session.run(f"""
model, _ = besa.load_model("llama-7b", "float32", "cpu")
expected = transformers.AutoModelForCausalLM.from_pretrained({str(llama)!r}, dtype="float32").state_dict()
assert all(value.equal(expected[name]) for name, value in model.state_dict().items())
from besa.inputs.models import checkpoint_identity
assert checkpoint_identity("llama-7b") == {REVISIONS[LLAMA][0]!r}
""")
    assert hub.asked and not [path for path in hub.asked if ".bin" in path]


def test_weights_are_fetched_once_the_calibration_text_is_known(hub, session):
    errors = session.besa(f"prune {LLAMA2} out --calibration nope", status=1)[1]
    assert "unknown text 'nope'" in errors
    asked = [path for path in hub.asked if LLAMA2 in path]
    assert asked and not [path for path in asked if path.endswith(".safetensors")]


def test_weights_are_fetched_once_the_output_is_known(hub, session):
    (session.folder / "full").mkdir()
    (session.folder / "full" / "thesis.tex").touch()
    errors = session.besa(f"prune {LLAMA2} full --calibration wikitext2 --n-samples 2 --seq-len 16", status=1)[1]
    assert "output 'full' holds 'thesis.tex', of no run of besa" in errors
    assert hub.asked and not [path for path in hub.asked if path.endswith(".safetensors")]


def test_weights_are_fetched_once_they_are_known_to_fit(hub, session):
    options = "--calibration wikitext2 --n-samples 2 --seq-len 16"
    planned = session.besa(f"prune {LLAMA2} planned {options} --dry-run")[0]
    assert "to write for 2 blocks" in planned and not (session.folder / "planned").exists()
    errors = session.besa(f"prune {LLAMA2} planned {options} --hidden-states host --dry-run", status=1)[1]
    assert "hidden_states='host' is for GPUs" in errors
    asked = [path for path in hub.asked if LLAMA2 in path]
    assert asked and not [path for path in asked if path.endswith(".safetensors")]
    whole = "".join(session.besa(f"prune {LLAMA2} planned {options}"))
    lines = [line for line in planned.splitlines() if line.startswith("disk: ")]
    assert lines and lines[0].partition(",")[0] in whole  # as many bytes as the files themselves say


def windows_of(documents, encode, n_samples, seq_len):
    """As the released code draws them."""
    random.seed(0)
    windows = []
    while len(windows) < n_samples:
        tokens = encode(documents[random.randint(0, len(documents) - 1)])
        if len(tokens) > seq_len:
            start = random.randint(0, len(tokens) - seq_len - 1)
            windows.append(tokens[start : start + seq_len])
    return windows


def test_texts_are_what_is_served_joined_and_tokenized_as_the_protocol_says(session, llama):
    output, _ = session.run("""
from besa.inputs.models import load_tokenizer
tokenizer = load_tokenizer("llama-7b")
for name in ("wikitext2", "c4", "ptb"):
    windows = besa.calibration_windows(name, tokenizer, 5, 40)
    print(json.dumps([besa.test_tokens(name, tokenizer).tolist(), windows.tolist()]))
both = [load_tokenizer(name) for name in ("llama-7b", "llama2-7b")]
print(json.dumps([tokenizer.decode(tokenizer("mer <unk> N")["input_ids"]) for tokenizer in both]))
""")
    encode = lambda text: tokenizers.Tokenizer.from_file(str(llama / "tokenizer.json")).encode(text).ids
    *found, spaces = map(json.loads, output.splitlines())
    for (tokens, windows), texts, joint in zip(found, TEXTS.values(), ["\n\n", " ", " "], strict=True):
        train, test = texts.values()
        assert tokens == encode(joint.join(test[:1100])) and tokens[0] == 1
        assert windows == windows_of(train, encode, 5, 40)
    assert spaces == ["<s> mer <unk>  N", "<s> mer <unk> N"]  # behind it, Llama 2 puts no space of its own


def table1(model, methods="dense, wanda, besa-row-wise"):
    """Its notebook, as papermill runs it by the model's parameters."""
    return f"""
from papermill.__main__ import papermill
asked = "{{methods: [{methods}], recipe: {{device: cpu}}}}"
command = ["{ROOT}/reproduce/table1.ipynb", "out.ipynb", "-f", "{ROOT}/reproduce/params/{model}.yaml"]
papermill([*command, "-p", "profile", "smoke", "-y", asked], standalone_mode=False)
"""


def test_table1_of_a_paper_model_runs_end_to_end_and_records_the_commit(session):
    session.run(table1("llama-7b"))
    table = pandas.read_csv(session.folder / "table1" / "llama-7b-smoke.csv", index_col="method")
    assert list(table.index) == ["dense", "wanda", "besa-row-wise", "wanda-matched"]
    assert np.isfinite(table[["wikitext2", "c4", "ptb"]].to_numpy(float)).all()
    records = [json.loads(path.read_text()) for path in (session.folder / "table1" / "records").iterdir()]
    assert {record["config"]["checkpoint"] for record in records} == {REVISIONS[LLAMA][0]}


EVALUATE = "evaluate llama-7b --device cpu --seq-len 32 --max-segments 1 --texts"
ASK = rf"it is gated; ask for access at \S+/{LLAMA2}, and log in by `hf auth login`"
REFUSALS = {  # command -> what is wrong, where, what is said
    "evaluate llama2-7b": ((401, "GatedRepo", "Log in."), f"{LLAMA2}/resolve", ASK),
    "prune llama2-7b out": ((403, "GatedRepo", "Ask."), f"{LLAMA2}/resolve", ASK),
    "evaluate llama-13b": (
        None,
        "",
        r"there is no \S+/huggyllama/llama-13b, or it is private; correct the name, or log in",
    ),
    "export llama-7b out": ((404, "RepoNotFound", "Not found"), LLAMA, rf"there is no \S+/{LLAMA}, or it is private"),
    "prune me/a/b out": (None, "", "'me/a/b' is no hub id; correct the name"),
    f"{EVALUATE} ptb": (
        (404, "RevisionNotFound", "Gone"),
        PTB,
        rf"{PTB} has no such revision any more; or put it into",
    ),
    f"{EVALUATE} c4": ((404, "EntryNotFound", "Gone"), "c4-valid", rf"{C4} lacks a file of it; or put it into"),
    f"{EVALUATE} wikitext2": ((429, "", "Slow down"), WIKITEXT, r"is busy \(status 429\); try again later"),
    "prune llama-7b out": ((503, "", "Down"), "api/models", r"is busy \(status 503\); try again later; without a hub"),
    f"{EVALUATE} wikitext2,c4": ("cut", "cdn/.*parquet", "RemoteProtocolError: .*; the same call again continues"),
    f"{EVALUATE} ptb,c4": ("cut", "cdn/.*model-00002", "RemoteProtocolError: .*; the same call again continues"),
}


@pytest.mark.parametrize("command", REFUSALS)
def test_what_the_hub_refuses_is_one_sentence_with_the_way_out(hub, session, command):
    trouble, where, words = REFUSALS[command]
    shutil.rmtree(session.home, ignore_errors=True)
    hub.trouble = {where: itertools.repeat(trouble)} if trouble else {}
    assert session.is_refused(command, words)


def test_a_notebook_ends_with_what_the_hub_refuses(hub, session):
    shutil.rmtree(session.home, ignore_errors=True)
    hub.trouble = {f"{LLAMA2}/resolve": itertools.repeat((401, "GatedRepo", "Log in."))}
    errors = session.run(table1("llama2-7b"), status=99)[1]
    assert re.search(rf"ValueError: cannot load the model .*the hub did not deliver it: .*{ASK}", errors), errors
    assert not list((session.folder / "table1" / "records").glob("llama2-7b*"))


def test_a_hub_that_stumbles_once_is_asked_again(hub, session):
    shutil.rmtree(session.home, ignore_errors=True)
    stumbles = {
        "api/models": (503, "", "Down"),
        "model-00002": "cut",
        "resolve/refs": (429, "", "Slow"),
        "0000.": "cut",
    }
    hub.trouble = {where: iter([trouble]) for where, trouble in stumbles.items()}
    assert "perplexity on ptb: " in session.besa(f"{EVALUATE} ptb")[0]
    assert not any(next(kinds, None) for kinds in hub.trouble.values())


def test_what_was_fetched_once_needs_no_hub(hub, session):
    """The last test: it takes the hub down."""
    shutil.rmtree(session.home, ignore_errors=True)
    online, _ = session.besa(f"{EVALUATE} wikitext2,c4,ptb")
    session.run("""
from besa.inputs.models import load_tokenizer
besa.calibration_windows("c4", load_tokenizer("llama-7b"), 1, 40)
""")
    hub.shutdown()
    hub.server_close()
    offline = Session(session.folder, HF_HUB_OFFLINE="1")
    for where, words in (
        (session, "ConnectError: .*; the same call again"),
        (offline, "HF_HUB_OFFLINE is set, and not"),
    ):
        assert where.besa(f"{EVALUATE} wikitext2,c4,ptb")[0] == online
        assert where.is_refused("evaluate llama2-7b", words)
        assert where.is_refused("prune llama-7b out --calibration wikitext2", words)
    shutil.rmtree(session.folder / "table1", ignore_errors=True)
    offline.run(table1("llama-7b", "dense"))
    assert (session.folder / "table1" / "llama-7b-smoke.csv").is_file()
    offline.process.kill(), offline.process.wait()

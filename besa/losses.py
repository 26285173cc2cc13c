"""Errors of a pruned block's output on one window."""

from besa.shapes import Scalar, Window


def reconstruction_error(output: Window, target: Window) -> Scalar:
    """Block loss of one window (Eqn. 1): sum(((target - output) / ||target||_2)^2) / hidden, with a norm per channel.

    So the released code has it; the paper writes the plain squared norm of the difference.
    """
    target = target.float()
    norm = target.norm(dim=1, keepdim=True).clamp_min(1e-12)  # (1, 1, hidden)
    return ((target - output.float()) / norm).square().sum() / target.shape[-1]


def token_error(output: Window, target: Window) -> Scalar:
    """Mean over tokens of sum_c d_c^2 / r_c, divided by sum_c r_c; d = (target - output) / ||target||.

    r_c is the root mean square of channel c of target / ||target||; one channel of Gemma holds 0.9 of the square norm.
    """
    target = target.float()
    norm = target.norm(dim=-1, keepdim=True).clamp_min(1e-6)  # (1, seq_len, 1)
    channels = (target / norm).square().mean(-2).sqrt().clamp_min(1e-6)  # (1, hidden)
    return (((target - output.float()) / norm).square() / channels).sum(-1).mean() / channels.sum()

"""The hybrid gradient of one response, four tokens long over five words, every number printed and done twice.

    python examples/0_gradient_by_hand.py        seconds, no GPU, no Megatron

A student wrote four words. A teacher has its own opinion of each, and the whole response earned a reward of 1. This
shows what each token is told: how far the two distributions are apart (KL), what its choice will still cost (C, the KL
of later tokens), whether to be reinforced (A), and the gradient on its five logits; first by the formulas in
megatron_hybrid/README.md, then by `vocab_parallel_hybrid_loss` and autograd.
"""

import torch

import megatron_hybrid as mh

WORDS = ["the", "cat", "dog", "sat", "."]
RESPONSE = torch.tensor([0, 1, 3, 4])  # "the cat sat ."
REWARD = 1.0
CONFIG = mh.HybridConfig(reward_weight=1.0, imitation_weight=0.5, discount=0.9, baseline="none", group_size=1)

STUDENT_LOGITS = torch.tensor(
    [[2.0, 0.0, 0.0, -1.0, -1.0], [0.0, 1.0, 1.0, 0.0, -1.0], [-1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 2.0]]
)
TEACHER_LOGITS = torch.tensor(
    [[2.0, 0.0, 0.0, -1.0, -1.0], [-1.0, 0.0, 2.0, 0.0, -1.0], [-1.0, 0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 3.0]]
)


def show(name: str, values: torch.Tensor) -> None:
    for word, row in zip(RESPONSE.tolist(), values.reshape(len(RESPONSE), -1).tolist(), strict=True):
        print(f"  {name:>10} {WORDS[word]:>4} " + " ".join(f"{value:+8.4f}" for value in row))
    print()


def main() -> None:
    beta, gamma = CONFIG.imitation_weight, CONFIG.discount
    log_p, log_q = STUDENT_LOGITS.log_softmax(-1), TEACHER_LOGITS.log_softmax(-1)
    p, log_ratio = log_p.exp(), log_p - log_q

    print("Student and teacher, one row for each token of the response, one column for each word:", *WORDS, "\n")
    show("p", p)
    show("q", log_q.exp())

    kl = (p * log_ratio).sum(-1)
    print("KL of each token, then C: the KL of the later ones, discounted by distance. The token's own is not in it.\n")
    show("KL", kl)
    future = mh.cost_to_go(kl[None], torch.ones(1, len(kl), dtype=torch.bool), gamma)[0]
    by_hand = [sum(gamma ** (later - t) * kl[later].item() for later in range(t + 1, 4)) for t in range(4)]
    torch.testing.assert_close(future, torch.tensor(by_hand, dtype=torch.float32))
    show("C", future)

    advantage = CONFIG.reward_weight * REWARD - beta * future
    print(f"A = {CONFIG.reward_weight} * reward - {beta} * C: positive reinforces the word that was said.\n")
    show("A", advantage)

    dense = beta * p * (log_ratio - kl[:, None])
    sparse = advantage[:, None] * (p - torch.nn.functional.one_hot(RESPONSE, len(WORDS)))
    print(
        "Dense part, beta p ((log p - log q) - KL): down where the student says a word more often than the teacher.\n"
    )
    show("dense", dense)
    print("Sparse part, A (p - onehot): negative at the word that was said, so descent makes it likelier.\n")
    show("sparse", sparse)
    show("sum", dense + sparse)

    student = STUDENT_LOGITS.clone().requires_grad_()

    def weigh(stats):
        """What the op asks between its two passes, when it knows every token's KL."""
        later = mh.cost_to_go(stats.kl[None], torch.ones(1, len(kl), dtype=torch.bool), gamma)[0]
        return torch.full_like(later, beta), CONFIG.reward_weight * REWARD - beta * later

    out = mh.vocab_parallel_hybrid_loss(student, TEACHER_LOGITS, RESPONSE, weigh=weigh)
    out.loss.sum().backward()
    print("The same from vocab_parallel_hybrid_loss and autograd:\n")
    show("op", student.grad)
    print(f"largest difference {(student.grad - dense - sparse).abs().max():.1e}; each row sums to 0:")
    show("row sum", student.grad.sum(-1))
    torch.testing.assert_close(student.grad, dense + sparse, rtol=1e-5, atol=1e-6)  # both fp32


if __name__ == "__main__":
    main()

"""What `plan_memory.py` prints."""

import sys

import plan_bytes
import plan_head
import plan_megatron
import plan_traffic
from plan_bytes import human
from plan_model import Plan
from rich.console import Console
from rich.table import Table

console = Console(width=None if sys.stdout.isatty() else 140)


def show(plan: Plan) -> None:
    """All tables of a plan."""
    settings(plan)
    memory(plan)
    traffic("what this package sends in a step, on a rank of the last stage", plan_traffic.ours(plan))
    traffic("what Megatron sends in the same step, approximately", plan_traffic.megatrons(plan))
    tokens(plan)


def settings(plan: Plan) -> None:
    """What the figures are for, derived numbers included."""
    layout, step = plan.layout, plan.step
    teacher = "no teacher" if plan.teacher is None else f"teacher {plan.teacher.name}, payload {step.payload}"
    console.print(
        f"student {plan.student.name}, {teacher}; {layout.ranks} ranks: TP {layout.tp} PP {layout.pp} VPP {layout.vpp} "
        f"CP {layout.cp} DP {layout.dp}\n"
        f"{step.responses} responses of {step.response_tokens} tokens behind prompts of {step.prompt_tokens}; "
        f"{plan.num_microbatches} micro-batches of {step.micro_batch} on each replica"
        + ("; gradient norms are measured" if plan_head.measures_norms(plan) else "")
    )
    for shape in plan.shapes:
        if layout.ends_count_as_layers(shape):
            console.print(
                f"{shape.name}: {shape.layers} layers on {layout.stages} stages, embedding and loss counted as a layer "
                "each (--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split)"
            )


def memory(plan: Plan) -> None:
    """Bytes on the first and last rank of a pipeline, and what stands at once."""
    lines = plan_bytes.items(plan, plan_megatron.activations(plan))
    shown = Table("", "first stage", "last stage", "when", "", title="memory of one rank")
    for line in lines:
        shown.add_row(line.name, human(line.first), human(line.last), line.when, line.note)
    for phase in ("sampling", "learning"):
        at_once = [line for line in lines if line.when in ("always", phase)]
        first, last = sum(line.first for line in at_once), sum(line.last for line in at_once)
        shown.add_row(f"while {phase}", human(first), human(last), style="bold")
    shown.add_section()
    theirs = human(plan_megatron.weights_and_optimizer(plan))
    note = "bf16; the optimizer over dp alone"
    shown.add_row("student's weights to optimizer, Megatron's estimate", theirs, "", "", note)
    console.print(shown)


def traffic(title: str, messages: list[plan_traffic.Message]) -> None:
    """Calls and bytes of one step."""
    shown = Table("", "call", "over", "calls", "bytes of one", "bytes of all", title=title)
    for message in messages:
        one = human(message.num_bytes / message.count)
        shown.add_row(message.what, message.call, message.axis, f"{message.count:,}", one, human(message.num_bytes))
    shown.add_section()
    shown.add_row("all", "", "", f"{sum(m.count for m in messages):,}", "", human(sum(m.num_bytes for m in messages)))
    console.print(shown)


def tokens(plan: Plan) -> None:
    """What one response token costs a rank of the last stage."""
    shown = Table("bytes of one response token", "", title="per token and rank")
    one_token = plan_head.logits(plan, 1)
    if plan.teacher is not None:
        shown.add_row(f"payload, {plan.step.payload}", human(plan_bytes.payload(plan, microbatches=1) / plan.tokens))
    shown.add_row("logits that the op reads", human(one_token))
    for message in plan_traffic.op(plan):
        shown.add_row(f"sent by {message.what}", human(message.num_bytes / (plan.num_microbatches * plan.tokens)))
    console.print(shown)

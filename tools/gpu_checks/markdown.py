"""The report of `tools/gpu_report.py` to read."""

from typing import Any

from benchmarks.table import lines


def render(report: dict[str, Any]) -> str:
    """A summary, then each step with its rows and, where it did not pass, the end of its log."""
    steps = report["steps"]
    machine = next((step["machine"] for step in steps.values() if step.get("machine")), "unknown machine")
    text = ["# GPU report", ""]
    if report["dry run"]:
        text += ["**A dry run on a CPU, with tiny sizes: its figures mean nothing.**", ""]
    text += [f"`{report.get('command', '')}`, {machine}.", ""]
    text += lines(
        {
            "step": f"[{name}](#{name})",
            "status": step["status"],
            "seconds": round(step.get("seconds", 0.0), 1),
            "limit": round(step.get("limit", 0.0), 1),
            "result": step.get("summary", ""),
        }
        for name, step in steps.items()
    )
    for name, step in steps.items():
        text += ["", f"## {name}", "", f"{step['title']}: **{step['status']}**.", ""]
        if "command" in step:
            text += ["```bash", step["command"], "```", ""]
        text += lines(step["rows"])
        if step.get("error"):
            # four backticks: a log may have a fence of its own
            text += ["", f"The end of `{name}.log`:", "", "````", step["error"], "````"]
    return "\n".join(text) + "\n"

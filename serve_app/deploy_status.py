"""Why an application does not come up: the one line in Serve's status that its user needs.

Serve reports a failed replica as several nested tracebacks; the reason is the error we raised.
"""

import re

from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

# "engine.errors.ConfigError: message" at the start of a line: an error meant to be read.
_OURS = re.compile(r"^(?:\w+\.)*(?:ConfigError|CheckpointError): (.+)$", re.MULTILINE)
# "package.SomeError: message", the last line of any traceback.
_ANY = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Interrupt|Exit)): (.+)$", re.MULTILINE)
_GONE = ("OutOfMemory", "killed due to memory", "SIGKILL")


def failure(status: ApplicationStatusOverview) -> str | None:
    """The reason why the application will not run, None while it still may.

    An error of ours is final at its first appearance: Serve's further attempts end the same way.
    """
    messages = [each.message for each in status.deployments.values()] + [status.message]
    for message in messages:
        if found := _OURS.findall(message):
            return str(found[-1])
    if status.status == ApplicationStatus.DEPLOY_FAILED:
        return _reason(max(messages, key=len))
    return None


def waiting_for(status: ApplicationStatusOverview) -> str | None:
    """What a deployment that takes long says of itself (no room on the cluster, a retry)."""
    for each in status.deployments.values():
        if each.message:
            return each.message.splitlines()[0]
    return None


def _reason(message: str) -> str:
    if any(word in message for word in _GONE):
        return (
            "a process of the engine was ended from outside, most likely for lack of memory; "
            "lower cache_max_entry_count, max_num_seqs or session_len, or take a smaller model"
        )
    if found := _ANY.findall(message):
        name, text = found[-1]
        return f"{name}: {text}"
    lines = [line for line in message.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "Ray Serve gave no reason; see its logs"

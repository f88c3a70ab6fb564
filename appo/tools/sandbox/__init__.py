"""Model-written code never runs unguarded.

Levels of isolation, probed by effect, and one function to run code in them.

strict    bubblewrap (own root, processes, network, users) + system-call filter + limits
landlock  Landlock + system-call filter + limits + a user id of its own when we are root; needs no
          installed program
rlimit    limits only, for development: needs allow_unsafe
remote    code is sent to a SandboxFusion-compatible server (remote.py)
"""

from appo.tools.sandbox.levels import Probe, choose_level, probe
from appo.tools.sandbox.limits import SandboxLevel, SandboxLimits, SandboxResult
from appo.tools.sandbox.runner import run_python

__all__ = [
    "Probe",
    "SandboxLevel",
    "SandboxLimits",
    "SandboxResult",
    "choose_level",
    "probe",
    "run_python",
]

"""Settings for nbval: the tutorials run on 4 blocks of the embedded model."""

import os
import sys
import tempfile
from pathlib import Path

from nbval.plugin import IPyNbCell

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from small_cache import make_small_cache

# nbval waits 5 seconds for the outputs of a cell that has ended: too few on a busy machine.
IPyNbCell.output_timeout = property(lambda self: 60, lambda self, seconds: None)


def pytest_sessionstart(session):
    is_controller = getattr(session.config.option, "numprocesses", None) and not hasattr(session.config, "workerinput")
    if not is_controller:
        os.environ.setdefault("BESA_PROFILE", "smoke")
        os.environ["BESA_CACHE"] = str(make_small_cache(Path(tempfile.mkdtemp(prefix="besa-"))))

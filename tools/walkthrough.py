"""Writes the page of one session: ``python -m tools.walkthrough --set output=FILE``."""

from __future__ import annotations

import sys
from typing import Any

from megacontext.evaluation.walkthrough import WalkthroughConfig, write_walkthrough
from tools._entry import tool_main


def run(config: WalkthroughConfig) -> dict[str, Any]:
    """Writes page and picture, and names them."""
    page, picture = write_walkthrough(config)
    return {"page": str(page), "picture": str(picture)}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Runs a short session under budget and writes its log and a picture of its focus.",
        WalkthroughConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())

"""One notebook, three sizes: seconds for CI, minutes for a course, the real thing."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")

PROFILES = ("ci", "course", "full")


def by_profile(profile: str, *, ci: T, course: T, full: T) -> T:
    """The value for the profile that the notebook runs in.

    >>> by_profile("course", ci=1, course=10, full=100)
    10

    Raises:
        ValueError: `profile` is none of "ci", "course", "full".
    """
    sizes = {"ci": ci, "course": course, "full": full}
    if profile not in sizes:
        raise ValueError(f"profile={profile!r}: expected one of {', '.join(PROFILES)}; set it in the parameters cell")
    return sizes[profile]

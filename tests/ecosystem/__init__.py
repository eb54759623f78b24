"""Some hundred configurations of packages that people train with, one file a family."""

from __future__ import annotations

from ecosystem.base import prepare

prepare()

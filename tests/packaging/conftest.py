"""Each way in is built once for all the packaging tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import ways_in


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> ways_in.InstalledPackage:
    return ways_in.pip_install(tmp_path_factory.mktemp("pip"))


@pytest.fixture(scope="session")
def wheel(
    installed: ways_in.InstalledPackage, tmp_path_factory: pytest.TempPathFactory
) -> ways_in.Wheel:
    return ways_in.build_wheel(installed, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def imported_checkout(tmp_path_factory: pytest.TempPathFactory) -> ways_in.ImportedCheckout:
    return ways_in.import_checkout(tmp_path_factory.mktemp("checkout_import"))


@pytest.fixture(scope="session")
def cmake_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ways_in.cmake_install(tmp_path_factory.mktemp("cmake"))

"""One CRI service for all tests that leave it alive: what it costs is paid once. Tests that kill start one of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cri_support import Cri, build_image
from leftovers import Leftovers, assert_settled, await_no_lease, look


@pytest.fixture(scope="session")
def cri_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_image(tmp_path_factory.mktemp("image") / "test.tar")


@pytest.fixture(scope="session")
def shared_cri(tmp_path_factory: pytest.TempPathFactory, cri_image: Path) -> Iterator[Cri]:
    service = Cri(tmp_path_factory.mktemp("cri"))
    try:
        service.start().load(cri_image)
        with service.pod() as pod:
            pod.start("true")  # the first pod makes what every later one finds: the node's top cgroups, the runtime's directory
        await_no_lease(service.prefix)
        yield service
        log = service.log()
        service.end()
        assert "Traceback" not in log, log
    finally:
        service.reset()


@pytest.fixture
def service(shared_cri: Cri) -> Iterator[Cri]:
    """The shared service; a test must leave nothing behind."""
    before = look(shared_cri.prefix)
    yield shared_cri
    assert_settled(shared_cri.prefix, before)


@pytest.fixture
def own_cri(tmp_path: Path, cri_image: Path) -> Iterator[Callable[..., Cri]]:
    """Makes a service of the test's own; whatever happens to it, `nacre reset` must leave nothing of it."""
    made: list[Cri] = []

    def make(**fields: object) -> Cri:
        made.append(Cri(tmp_path / f"node{len(made)}", **fields))  # type: ignore[arg-type]  # fields of Cri
        made[-1].start().load(cri_image)
        return made[-1]

    yield make
    for one in made:
        one.reset()
        assert look(one.prefix) == Leftovers()

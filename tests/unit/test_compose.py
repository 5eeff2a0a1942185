"""docker-compose.yml, the Dockerfile and what they name, as far as that can be checked without an engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from service.cli import app as ranktower
from service.settings import Settings
from tests.fake_service import fake_service

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
SCRIPT = (ROOT / "deploy" / "publish-demo.sh").read_text()
IMAGE_COMMANDS = {  # what a health check may call in an image that is not ours
    "redis": {"redis-cli", "grep"},
    "prom/prometheus": {"wget"},
}


def interpolated(value: Any) -> Any:
    """The value with every ${NAME:-default} as compose reads it where NAME is not set: after YAML, so always text."""
    if isinstance(value, dict):
        return {name: interpolated(each) for name, each in value.items()}
    if isinstance(value, list):
        return [interpolated(each) for each in value]
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) if isinstance(value, str) else value


COMPOSE: dict[str, Any] = interpolated(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = sorted(name for name, service in SERVICES.items() if "build" in service)
FOREIGN = sorted(set(SERVICES) - set(OURS))
ONE_SHOTS = {"publisher"}


def stages() -> dict[str, str]:
    """The Dockerfile's stages by name, each with its lines."""
    parts = re.split(r"^FROM \S+ AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def check_of(name: str) -> list[str]:
    """The words of a health check."""
    test: list[str] = SERVICES[name]["healthcheck"]["test"]
    return test[1].split() if test[0] == "CMD-SHELL" else test[1:]


def test_the_services_are_the_documented_ones() -> None:
    assert list(SERVICES) == ["redis", "publisher", "service", "locust", "prometheus"]
    assert SERVICES["locust"]["profiles"] == ["load"]
    assert SERVICES["prometheus"]["profiles"] == ["metrics"]
    assert not any("profiles" in SERVICES[name] for name in ("redis", "publisher", "service"))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_for_what_can_be_waited_for(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        assert other in SERVICES
        wanted = "service_completed_successfully" if other in ONE_SHOTS else "service_healthy"
        assert how["condition"] == wanted
        assert (other in ONE_SHOTS) != ("healthcheck" in SERVICES[other])


def test_the_service_starts_after_redis_is_healthy_and_the_publisher_is_done() -> None:
    assert SERVICES["publisher"]["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert set(SERVICES["service"]["depends_on"]) == {"redis", "publisher"}


@pytest.mark.parametrize("name", sorted(set(SERVICES) - ONE_SHOTS))
def test_every_long_running_service_has_a_health_check_of_commands_that_its_image_has(name: str) -> None:
    words = check_of(name)
    if name in OURS:
        assert words[:2] == ["python", "/opt/ranktower/healthy.py"]
        assert "COPY deploy/healthy.py ./" in stages()["base"]
    else:
        image = SERVICES[name]["image"].split(":")[0]
        commands = {part.split()[0] for part in " ".join(words).split("|")}
        assert commands <= IMAGE_COMMANDS[image]


@pytest.mark.parametrize("name", OURS)
def test_every_build_names_a_stage_and_what_it_copies_exists_in_the_context(name: str) -> None:
    build = SERVICES[name]["build"]
    assert (ROOT / build["dockerfile"]).is_file()
    assert build["target"] in stages()
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert source.split("/")[0] in kept


@pytest.mark.parametrize("stage", stages())
def test_stages_copy_from_stages_and_end_without_root(stage: str) -> None:
    assert set(re.findall(r"--from=(\S+)", stages()[stage])) <= set(stages())
    if stage in {SERVICES[name]["build"]["target"] for name in OURS}:
        assert re.findall(r"^USER (\S+)$", stages()[stage], re.MULTILINE) == ["ranktower"]


def test_images_install_extras_that_exist_and_the_service_has_no_torch() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"'\.\[([\w,]+)\]'", DOCKERFILE):
        assert set(named.split(",")) <= set(extras)
    assert "'.[serve]'" in stages()["build-service"]
    assert not any(need.startswith("torch") for need in extras["serve"])
    (torch,) = (need for need in extras["train"] if need.startswith("torch"))
    assert torch in stages()["build-train"]


@pytest.mark.parametrize(
    "text", [(ROOT / "docker-compose.yml").read_text(), DOCKERFILE, SCRIPT], ids=["compose", "dockerfile", "script"]
)
def test_every_setting_named_is_one_of_the_service(text: str) -> None:
    named = {name.lower() for name in re.findall(r"\bRANKTOWER_([A-Z_]+)", text)}
    assert named <= set(Settings.model_fields)


def test_settings_given_by_compose_are_valid() -> None:
    given = SERVICES["service"]["environment"]
    Settings(**{name.removeprefix("RANKTOWER_").lower(): value for name, value in given.items()})


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback_and_are_the_ones_checked(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        address, _, inside = port.split(":")
        assert address == "127.0.0.1"
        assert any(f":{inside}/" in word for word in check_of(name))
        if name in OURS:
            assert f"EXPOSE {inside}" in stages()[SERVICES[name]["build"]["target"]]


@pytest.mark.parametrize("name", SERVICES)
def test_volumes_are_declared_or_files_of_the_repository(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source = volume.split(":")[0]
        assert source in COMPOSE["volumes"] or (ROOT / source).is_file()


def test_passwords_come_from_the_environment() -> None:
    raw = (ROOT / "docker-compose.yml").read_text()
    default = "local-use-only"
    assert raw.count(default) == raw.count(f"${{REDIS_PASSWORD:-{default}}}") > 0
    assert not re.search(r"(?i)(password|secret|token)\s*[:=]\s*[^$\s]", re.sub(r"#.*|\$\{[^}]*\}", "", raw))


@pytest.mark.parametrize("name", OURS)
def test_our_containers_can_do_little(name: str) -> None:
    assert SERVICES[name]["read_only"] is True
    assert SERVICES[name]["cap_drop"] == ["ALL"]
    assert SERVICES[name]["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", SERVICES)
def test_words_of_commands_are_text(name: str) -> None:
    assert all(
        isinstance(word, str)
        for word in [*SERVICES[name].get("command", []), *SERVICES[name].get("environment", {}).values()]
    )


def test_foreign_images_have_a_version() -> None:
    assert all(re.search(r":v?\d+\.\d+", SERVICES[name]["image"]) for name in FOREIGN)


def test_prometheus_scrapes_the_service_where_it_listens() -> None:
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    targets = [target for job in scraped for config in job["static_configs"] for target in config["targets"]]
    assert targets == ["service:8080"]
    assert "RANKTOWER_PORT=8080" in stages()["service"]


def test_the_publishers_script_is_shell() -> None:
    subprocess.run(["sh", "-n", ROOT / "deploy" / "publish-demo.sh"], check=True)
    assert (ROOT / "deploy" / "publish-demo.sh").stat().st_mode & 0o111


@pytest.mark.parametrize(
    "call", re.findall(r"ranktower ((?:[\w \-/.]|\"[^\"]*\"|\\\n)+)", SCRIPT.partition("set -eu")[2])
)
def test_the_publishers_script_calls_verbs_and_flags_that_exist(call: str) -> None:
    words = call.replace("\\\n", " ").split()
    verb: Any = get_command(ranktower)
    while hasattr(verb, "commands"):
        verb = verb.commands[words.pop(0)]
    options = [parameter for parameter in verb.params if parameter.param_type_name == "option"]
    flags = {flag for option in options for flag in option.opts}
    needed = {option.opts[0] for option in options if option.required}
    assert needed <= {word for word in words if word.startswith("--")} <= flags


def test_the_health_check_tells_a_ready_service_from_none() -> None:
    def code(url: str) -> int:
        return subprocess.run([sys.executable, ROOT / "deploy" / "healthy.py", url], check=False).returncode

    with fake_service() as url:
        assert code(f"{url}/readyz") == 0
    assert code(f"{url}/readyz") == 1


def test_compose_itself_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], check=False, capture_output=True).returncode:
        pytest.skip("no docker compose here")
    for profile in ("load", "metrics"):
        subprocess.run([docker, "compose", "--profile", profile, "config", "--quiet"], check=True, cwd=ROOT)


def test_redis_keeps_what_is_nowhere_else() -> None:
    command = SERVICES["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--appendfsync"] == "everysec"
    assert options["--maxmemory-policy"] == "noeviction"
    assert SERVICES["redis"]["volumes"] == ["redis-data:/data"]

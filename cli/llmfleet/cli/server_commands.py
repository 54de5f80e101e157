"""Options of `llmfleet operator` and `llmfleet gateway`.

Every option can also be set by an environment variable, which is how a Deployment sets it. Defaults are those of the
settings classes, which check what they are given; here an address or a file becomes a setting and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import typer

from llmfleet.cli.refused import RefusedError

LogFormat = Annotated[
    Literal["json", "console"],
    typer.Option(envvar="LLMFLEET_LOG_FORMAT", help="One JSON object per line, or lines for people."),
]


def operator(
    namespace: Annotated[
        str, typer.Option("-n", "--namespace", metavar="NAME", envvar="LLMFLEET_NAMESPACE", help="Holds the Lease.")
    ] = "llmfleet-system",
    identity: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            envvar="LLMFLEET_IDENTITY",
            help="Holder's name in the Lease, unique among replicas.",
            show_default="host name and process id",
        ),
    ] = None,
    gateway_url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            envvar="LLMFLEET_GATEWAY_URLS",
            help="Admin address of gateways; a name stands for all its addresses. May be repeated. Without it, the "
            "operator plans for what the services expect.",
            show_default=False,
        ),
    ] = None,
    gateway_token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="LLMFLEET_GATEWAY_TOKEN_FILE",
            help="Bearer token of the gateways' admin ports; read again before each round.",
            show_default=False,
        ),
    ] = None,
    listen: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", envvar="LLMFLEET_LISTEN", help="Address of /healthz, /readyz and /metrics."),
    ] = "0.0.0.0:8080",
    log_format: LogFormat = "json",
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        typer.Option(envvar="LLMFLEET_LOG_LEVEL", help="Least severity that is logged.", case_sensitive=False),
    ] = "INFO",
) -> None:
    """Run the operator.

    Plans the fleet and carries the plan out in the cluster that KUBECONFIG names, or, inside a pod, in its own. Several
    replicas may run: one holds the Lease and acts, the others wait for it.

    \b
    Examples:
      llmfleet operator --log-format console
      llmfleet operator --gateway-url http://llmfleet-gateway-admin:8081 --gateway-token-file /etc/llmfleet/token
    """
    from lightkube.core.exceptions import ConfigError

    from llmfleet.operator.main import run
    from llmfleet.operator.settings import OperatorSettings, default_identity

    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise typer.BadParameter(f"{listen!r} is not HOST:PORT with a port of 0 to 65535", param_hint="--listen")
    if gateway_token_file is not None and not gateway_token_file.is_file():
        raise typer.BadParameter(f"{gateway_token_file} is no file", param_hint="--gateway-token-file")
    for url in gateway_url or ():
        if not _is_address(url):
            raise typer.BadParameter(f"{url!r} is not http://HOST[:PORT]", param_hint="--gateway-url")
    settings = OperatorSettings(
        namespace=namespace,
        identity=identity or default_identity(),
        gateway_urls=tuple(gateway_url or ()),
        gateway_token_file=gateway_token_file,
        listen_host=host.strip("[]") or "0.0.0.0",
        listen_port=int(port),
        log_format=log_format,
        log_level=log_level,
    )
    try:
        run(settings)
    except ConfigError as error:
        raise RefusedError(f"no cluster: {error}; set KUBECONFIG, or run in a pod") from error
    except OSError as error:
        raise RefusedError(f"--listen {listen}: {error.strerror or error}") from error


def _is_address(url: str) -> bool:
    """Whether it is http(s), with a host, and with a port that there is, if with one."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def gateway(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", envvar="LLMFLEET_LISTEN", help="Address of the OpenAI API.")
    ] = "127.0.0.1:8080",
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="LLMFLEET_TLS_CERT",
            help="PEM certificate chain of the API, with --tls-key; both are read again when they change.",
            show_default="plain HTTP",
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="LLMFLEET_TLS_KEY", help="Its key, not encrypted.", show_default=False),
    ] = None,
    admin_listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT", envvar="LLMFLEET_ADMIN_LISTEN", help="Address of metrics, health and demand."
        ),
    ] = "127.0.0.1:8081",
    admin_token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="LLMFLEET_ADMIN_TOKEN_FILE",
            help="Bearer token that /v1/demand asks for; without it nobody may read the demand.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[VARIANT=]URL[#control=HOST:PORT]",
            envvar="LLMFLEET_ENGINES",
            help="An engine, for running without Kubernetes. May be repeated. VARIANT needs --routing-file; control is "
            "the port of its migration plug-in, and needs --peer-key-file.",
            show_default=False,
        ),
    ] = None,
    routing_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="LLMFLEET_ROUTING_FILE",
            help="Routing table as JSON for --engine; without it one service takes every model.",
            show_default=False,
        ),
    ] = None,
    peer_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="LLMFLEET_PEER_KEY_FILE",
            help="Key that the migration plug-ins of --engine were started with; their streams can then move.",
            show_default=False,
        ),
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option(
            "-n",
            "--namespace",
            metavar="NAME",
            envvar="LLMFLEET_NAMESPACE",
            help="Watch only this namespace.",
            show_default="all",
        ),
    ] = None,
    kubeconfig: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Kubeconfig file.",
            show_default="KUBECONFIG, then the pod's service account",
        ),
    ] = None,
    drain_taint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            envvar="LLMFLEET_DRAIN_TAINTS",
            help="Taint that announces a node's end: the streams of its engines are moved, as from a cordoned node. "
            "May be repeated.",
            show_default="those of AWS, GKE, AKS, Karpenter and the cluster autoscaler",
        ),
    ] = None,
    drain: Annotated[
        float,
        typer.Option(metavar="SECONDS", envvar="LLMFLEET_DRAIN_S", help="How long requests may finish after SIGTERM."),
    ] = 300.0,
    queue_wait: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            envvar="LLMFLEET_QUEUE_WAIT_S",
            help="How long a request may wait for an engine. The first request of a service without replicas is "
            "answered if its engine starts within this time.",
        ),
    ] = 300.0,
    log_format: LogFormat = "console",
) -> None:
    """Run the gateway, an OpenAI-compatible API.

    It stands in front of the fleet's engines, and finds them and their routing tables in the cluster that KUBECONFIG
    names, or, inside a pod, in its own; with --engine it needs no Kubernetes.

    \b
    Examples:
      llmfleet gateway --listen 0.0.0.0:8080 --admin-listen 0.0.0.0:8081 --admin-token-file /etc/llmfleet/token
      llmfleet gateway --engine http://127.0.0.1:8000
      llmfleet gateway --engine l4=http://10.0.0.5:8000 --engine h100=http://10.0.0.6:8000 --routing-file routing.json
    """
    from llmfleet.gateway.main import run
    from llmfleet.gateway.settings import DRAIN_TAINTS, GatewaySettings, SettingsError
    from llmfleet.gateway.transport import Limits

    try:
        settings = GatewaySettings(
            listen=listen,
            tls_cert=tls_cert,
            tls_key=tls_key,
            admin_listen=admin_listen,
            admin_token_file=admin_token_file,
            engines=tuple(engine or ()),
            routing_file=routing_file,
            peer_key_file=peer_key_file,
            namespace=namespace,
            kubeconfig=kubeconfig,
            drain_taints=DRAIN_TAINTS if drain_taint is None else tuple(drain_taint),
            drain_s=drain,
            limits=Limits(queue_wait_s=queue_wait),
            log_format=log_format,
        )
        run(settings)
    except SettingsError as error:
        raise typer.BadParameter(str(error), param_hint="the options") from error
    except OSError as error:
        raise RefusedError(str(error.strerror or error)) from error

"""The commands of a hub and of its sites. Each imports its work when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedflame.cli.options import (
    CHECK_FAILED,
    ConfigFile,
    Data,
    Debug,
    Model,
    Overrides,
    config_of,
    user_errors,
)
from fedflame.config.load import load_config
from fedflame.config.settings import validated
from fedflame.errors import UserError

app = typer.Typer()
hub_app = typer.Typer(
    help="Set up and check the hub of a federation over NVIDIA FLARE.", no_args_is_help=True
)
site_app = typer.Typer(help="Set up and check a site that takes part.", no_args_is_help=True)
app.add_typer(hub_app, name="hub")
app.add_typer(site_app, name="site")


@app.command()
def split(
    output_dir: Annotated[Path, typer.Option(help="Folder for the files; empty or not there yet.")],
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    data: Data = None,
    model: Model = None,
    debug: Debug = False,
) -> None:
    """Write each client's rows into a file of its own, for sites that train the same experiment."""
    console = Console()
    with user_errors(debug):
        config = config_of(config_file, overrides, data, model)
        from fedflame.commands.split import write_parts
        from fedflame.data.federation import load_federation

        write_parts(load_federation(config), config.afforded_experts(), output_dir, console)


@hub_app.command("init")
def hub_init(
    folder: Annotated[Path, typer.Argument(help="Folder for kits and the hub's file.")],
    sites: Annotated[str, typer.Option(help="Names of the sites, comma-separated; call again to add some.")],
    host: Annotated[str, typer.Option(help="The hub's name as the sites resolve it.")],
    admin: Annotated[str, typer.Option(help="Mail address of who may start runs.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="The one TCP port of the hub.")] = 8002,
    debug: Debug = False,
) -> None:
    """Make certificates and kits for a hub and its sites, and say what to do with them."""
    with user_errors(debug):
        from fedflame.commands.hub import init_hub
        from fedflame.engines.hub import Hub
        from fedflame.engines.nvflare.provision import Federation

        names = validated(Hub, {"sites": sites}, "--sites").site_names()
        init_hub(folder, Federation(host, port, names, [admin]), Console())


@hub_app.command("check")
def hub_check(
    hub: Annotated[Path, typer.Argument(help="The hub's file.")],
    config_file: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Test certificate, port, clock, disk, server, sites and model, and say what to mend."""
    with user_errors(debug):
        from fedflame.commands.hub import check_hub
        from fedflame.engines.hub import load_hub

        model = load_config(config_file).model.model_name_or_path if config_file else None
        if not check_hub(load_hub(hub), model, Console()):
            raise typer.Exit(CHECK_FAILED)


@hub_app.command("renew")
def hub_renew(
    hub: Annotated[Path, typer.Argument(help="The hub's file, in the folder of its kits.")],
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Sites, host or administrators; without any, all whose certificates end soon."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Sign new certificates with the same authority; who is not named keeps key and certificate."""
    with user_errors(debug):
        from fedflame.commands.membership import renew_members
        from fedflame.engines.hub import load_hub

        renew_members(load_hub(hub), names or [], Console())


@hub_app.command("revoke")
def hub_revoke(
    hub: Annotated[Path, typer.Argument(help="The hub's file, in the folder of its kits.")],
    site: Annotated[str, typer.Argument(help="The site that may join no longer.")],
    debug: Debug = False,
) -> None:
    """Shut a site out for good, also of runs under way; the others keep keys and certificates."""
    with user_errors(debug):
        from fedflame.commands.membership import revoke_site
        from fedflame.engines.hub import load_hub

        revoke_site(load_hub(hub), site, Console())


@site_app.command("init")
def site_init(
    folder: Annotated[Path, typer.Argument(help="Folder for the site's file and the trainer's state.")],
    data: Annotated[str, typer.Option(help="The rows to train on: a data file or a hub id.")],
    active_experts: Annotated[int, typer.Option(min=1, help="Experts per token that this machine affords.")],
    allow_model: Annotated[
        list[str],
        typer.Option(help="A base model that may be trained: NAME or NAME=FOLDER; may be repeated."),
    ],
    kit: Annotated[
        Path | None, typer.Option(help="Over NVIDIA FLARE: the kit that the hub's administrator sent.")
    ] = None,
    superlink: Annotated[str, typer.Option(help="Over Flower: host and port of the SuperLink.")] = "",
    root_certificates: Annotated[
        Path, typer.Option(help="Over Flower: PEM file of who signed the SuperLink's certificate.")
    ] = Path("ca.crt"),
    name: Annotated[str, typer.Option(help="Over Flower: what the hub's file calls this site.")] = "",
    debug: Debug = False,
) -> None:
    """Write the site's file and its services, and say what to do with them."""
    with user_errors(debug):
        from fedflame.commands.site import NewSite, flower_engine, init_site, nvflare_engine, parse_models

        new = NewSite(data, active_experts, parse_models(allow_model))
        if kit is not None and not superlink:
            engine = nvflare_engine(kit)
        elif superlink and name and kit is None:
            engine = flower_engine(name, folder, superlink, root_certificates)
        else:
            raise UserError("site init needs either --kit (NVIDIA FLARE) or --superlink and --name (Flower)")
        init_site(folder, new, engine, Console())


@site_app.command("check")
def site_check(site: Annotated[Path, typer.Argument(help="The site's file.")], debug: Debug = False) -> None:
    """Test certificate, port, clock, disk, data, models and trainer, and say what to mend."""
    with user_errors(debug):
        from fedflame.commands.site import check_site
        from fedflame.trainer.site import load_site

        if not check_site(load_site(site), Console()):
            raise typer.Exit(CHECK_FAILED)


@site_app.command("privacy")
def site_privacy(
    site: Annotated[Path, typer.Argument(help="The site's file.")], debug: Debug = False
) -> None:
    """Show what private runs have spent here, and what the site's file leaves."""
    with user_errors(debug):
        from fedflame.commands.site_privacy import print_privacy_of
        from fedflame.trainer.site import load_site

        print_privacy_of(load_site(site), Console())


@app.command()
def trainer(
    site: Annotated[Path, typer.Option(help="TOML file of this site: its data, its k, what it allows.")],
    debug: Debug = False,
) -> None:
    """Serve this site's rows and k to the federation's engine, until interrupted."""
    with user_errors(debug):
        from fedflame.commands.trainer import run_trainer

        run_trainer(site, Console())

"""`/docs`: the OpenAPI document for people, with Swagger UI's files from this server: it works offline."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

ASSETS: Final = files("fastapi_offline") / "static"


@router.get("/docs")
async def docs() -> HTMLResponse:
    """The page. Its addresses are relative, so that it works below a proxy's prefix."""
    return get_swagger_ui_html(
        title="TrimRT",
        openapi_url="openapi.json",
        swagger_js_url="docs/assets/swagger-ui-bundle.js",
        swagger_css_url="docs/assets/swagger-ui.css",
        swagger_favicon_url="page/icon.svg",
    )

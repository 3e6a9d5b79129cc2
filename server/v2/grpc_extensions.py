"""Triton's extensions over gRPC; `extensions` and `regions` say what they mean."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from server.auth import require_key
from server.bodies import body_too_large
from server.problems import Problem
from server.service import Service
from server.v2 import core, extensions
from server.v2 import inference_pb2 as pb
from server.v2.grpc_call import (
    LARGE_REQUEST,
    Context,
    Message,
    Type,
    caller_of,
    check_texts,
    parsed,
    value_of,
)
from server.v2.intake import Intake

_TraceValue = pb.TraceSettingResponse.SettingValue
_RegionStatus = pb.SystemSharedMemoryStatusResponse.RegionStatus


async def read_message(intake: Intake, context: Context, kind: Type[Message]) -> Message:
    """The call's message, which is a small one.

    Raises:
        Problem: `body-too-large`, or see `Intake.receive` and `parsed`.
    """
    message = await intake.receive(context.read)
    if len(message) > LARGE_REQUEST:
        raise body_too_large(LARGE_REQUEST)
    return parsed(kind, message)


class Extensions:
    """The methods of Triton's extensions, for `inference.GRPCInferenceService`."""

    def __init__(self, service: Service, intake: Intake) -> None:
        self._service = service
        self._intake = intake

    def methods(self) -> list[Callable[[Context], Awaitable[Any]]]:
        """All of them; they are named as the service names them."""
        return [
            *(self.model_config, self.model_statistics),
            *(self.repository_index, self.repository_model_load, self.repository_model_unload),
            *(self.trace_setting, self.log_settings),
            self.system_shared_memory_status,
            self.system_shared_memory_register,
            self.system_shared_memory_unregister,
            *(self.cuda_shared_memory_status, self.cuda_shared_memory_register),
            self.cuda_shared_memory_unregister,
        ]

    async def model_config(self, context: Context) -> pb.ModelConfigResponse:
        """The model's configuration, as Triton describes one."""
        request = await self._read(context, pb.ModelConfigRequest)
        check_texts(request.name, request.version)
        return pb.ModelConfigResponse(
            config=extensions.model_config(self._service, request.name, request.version)
        )

    async def model_statistics(self, context: Context) -> pb.ModelStatisticsResponse:
        """Counts and durations of a model, or of all."""
        request = await self._read(context, pb.ModelStatisticsRequest)
        check_texts(request.name, request.version)
        told = await extensions.statistics(self._service, request.name, request.version)
        return pb.ModelStatisticsResponse(**told)

    async def repository_index(self, context: Context) -> pb.RepositoryIndexResponse:
        """Every engine that is loaded or could be."""
        request = await self._read(context, pb.RepositoryIndexRequest)
        models = await extensions.repository_index(self._service, ready=request.ready)
        return pb.RepositoryIndexResponse(
            models=[pb.RepositoryIndexResponse.ModelIndex(**model) for model in models]
        )

    async def repository_model_load(self, context: Context) -> pb.RepositoryModelLoadResponse:
        """As `POST /engines/{name}/load`."""
        self._require_key(context)
        request = await self._read(context, pb.RepositoryModelLoadRequest)
        check_texts(request.model_name)
        await extensions.load_model(self._service, request.model_name, request.parameters)
        return pb.RepositoryModelLoadResponse()

    async def repository_model_unload(self, context: Context) -> pb.RepositoryModelUnloadResponse:
        """As `POST /engines/{name}/unload`."""
        self._require_key(context)
        request = await self._read(context, pb.RepositoryModelUnloadRequest)
        check_texts(request.model_name)
        await extensions.unload_model(self._service, request.model_name)
        return pb.RepositoryModelUnloadResponse()

    async def trace_setting(self, context: Context) -> pb.TraceSettingResponse:
        """Which requests leave a trace; with settings, change that."""
        request = await self._read(context, pb.TraceSettingRequest)
        check_texts(request.model_name)
        changes = {name: list(setting.value) or None for name, setting in request.settings.items()}
        if changes:
            self._require_key(context)
        settings = extensions.trace_settings(self._service, request.model_name, changes)
        return pb.TraceSettingResponse(
            settings={
                name: _TraceValue(value=value if isinstance(value, list) else [value])
                for name, value in settings.items()
            }
        )

    async def log_settings(self, context: Context) -> pb.LogSettingsResponse:
        """Which levels of the log are written; with settings, change that."""
        request = await self._read(context, pb.LogSettingsRequest)
        changes = {name: value_of(setting) for name, setting in request.settings.items()}
        if changes:
            self._require_key(context)
        return _log_settings(extensions.log_settings(self._service, changes))

    async def system_shared_memory_status(self, context: Context) -> pb.SystemSharedMemoryStatusResponse:
        """The registered regions."""
        self._require_local(context)
        request = await self._read(context, pb.SystemSharedMemoryStatusRequest)
        check_texts(request.name)
        regions = self._service.regions.status(request.name)
        return pb.SystemSharedMemoryStatusResponse(
            regions={name: _RegionStatus(**region) for name, region in regions.items()}
        )

    async def system_shared_memory_register(self, context: Context) -> pb.SystemSharedMemoryRegisterResponse:
        """Register a region of an object in shared memory."""
        self._require_local(context)
        request = await self._read(context, pb.SystemSharedMemoryRegisterRequest)
        check_texts(request.name, request.key)
        self._service.regions.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    async def system_shared_memory_unregister(
        self, context: Context
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Forget a region, or all."""
        self._require_local(context)
        request = await self._read(context, pb.SystemSharedMemoryUnregisterRequest)
        check_texts(request.name)
        self._service.regions.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def cuda_shared_memory_status(self, _context: Context) -> pb.CudaSharedMemoryStatusResponse:
        """Refused."""
        raise Problem("not-supported", core.NO_CUDA_MEMORY)

    async def cuda_shared_memory_register(self, _context: Context) -> pb.CudaSharedMemoryRegisterResponse:
        """Refused."""
        raise Problem("not-supported", core.NO_CUDA_MEMORY)

    async def cuda_shared_memory_unregister(self, _context: Context) -> pb.CudaSharedMemoryUnregisterResponse:
        """Refused."""
        raise Problem("not-supported", core.NO_CUDA_MEMORY)

    async def _read(self, context: Context, kind: Type[Message]) -> Message:
        return await read_message(self._intake, context, kind)

    def _require_key(self, context: Context) -> None:
        require_key(caller_of(context), self._service.settings)

    def _require_local(self, context: Context) -> None:
        self._require_key(context)
        self._service.regions.check(caller_of(context))


def _log_settings(settings: Mapping[str, Any]) -> pb.LogSettingsResponse:
    kinds = {bool: "bool_param", int: "uint32_param", str: "string_param"}
    return pb.LogSettingsResponse(
        settings={
            name: pb.LogSettingsResponse.SettingValue(**{kinds[type(value)]: value})
            for name, value in settings.items()
        }
    )

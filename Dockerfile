# Two images from one file: `service` (web, worker, learner, beat) and `agent` (one device).
FROM python:3.12-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 ORT_DISABLE_TELEMETRY=1
RUN useradd --create-home --uid 1000 qoe && mkdir /data /install && chown qoe /data /install
WORKDIR /app

FROM base AS service
COPY requirements/run.txt requirements/run.txt
RUN pip install --require-hashes --only-binary :all: -r requirements/run.txt
COPY manage.py ./
COPY device_agents device_agents
COPY selector selector
COPY qoe_service qoe_service
COPY web web
COPY demo demo
ENV DATA_DIR=/data
USER qoe
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=20s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz')"]
CMD ["uvicorn", "qoe_service.asgi:application", "--host", "0.0.0.0", "--port", "8000", "--no-server-header", "--timeout-graceful-shutdown", "5"]

FROM base AS agent
COPY requirements/agent.txt requirements/agent.txt
RUN pip install --require-hashes --only-binary :all: -r requirements/agent.txt
COPY device_agents device_agents
RUN pip install --no-deps ./device_agents
ENV QOE_AGENT_STATE_DIR=/data
USER qoe
VOLUME /data
EXPOSE 8600
CMD ["qoe-agent", "run"]

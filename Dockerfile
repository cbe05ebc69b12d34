# After `make dist`: docker build -t moesaic .
# docker run --rm -v "$PWD:/work" moesaic train run.yaml; to serve: -p 8000:8000, and in serve.yaml host 0.0.0.0 and keys
FROM debian:12-slim AS cpu
RUN useradd --create-home --uid 1000 moesaic && mkdir /work && chown moesaic /work
COPY build/dist/moesaic-*-linux-x86_64 /opt/moesaic
RUN ln -s /opt/moesaic/bin/moesaic /usr/local/bin/moesaic && moesaic --version
USER moesaic
WORKDIR /work
ENTRYPOINT ["moesaic"]

# docker build --target cuda -t moesaic:cuda .; docker run --gpus all ...
FROM cpu AS cuda
USER root
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/* \
  && python3 -m venv /opt/torch && /opt/torch/bin/pip install --no-cache-dir torch==2.11.0
ENV MOESAIC_TORCH_LIB=/opt/torch/lib/python3.11/site-packages/torch/lib
USER moesaic

FROM cpu

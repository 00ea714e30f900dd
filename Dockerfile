# docker build --tag scratch_det .
# docker run --rm --gpus all --ipc host --volume /path/to/datasets:/datasets --volume "$PWD/output:/work/output" \
#     scratch_det train --config-file configs/Digits/quickstart.yaml --resume
FROM python:3.11-slim-bookworm
ENV DETECTRON2_DATASETS=/datasets
COPY . /source
RUN pip install --no-cache-dir --constraint /source/constraints.txt "/source[demo]" && rm -r /source
WORKDIR /work
ENTRYPOINT ["scratch-det"]
CMD ["--help"]

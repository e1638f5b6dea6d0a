"""`transport_params`: what smart-open documents has its effect, and all else is refused."""

import base64
import contextlib
import os
from typing import Any

import boto3
import botocore.config
import pytest
import requests
import torch

import anemoi_ckpt
import servers
from _anemoi_ckpt.places import Buffers, list_page, open_writer, read_version, remove_object
from _anemoi_ckpt.places.azure import client_of
from anemoi_ckpt import (
    CheckpointError,
    InvalidURIError,
    download,
    latest,
    list_objects,
    load,
    open_stream,
    parse_uri,
    peek,
    read_range,
    save,
)
from checkpoints import as_bytes, assert_same

OLD, NEW = {"a": torch.ones(3), "epoch": 1}, {"a": torch.zeros(3), "epoch": 0}
BIG = {"w": torch.arange(3_000_000.0)}


def read_by_all(uri: str, params: dict[str, Any], tmp_path: Any) -> list[Any]:
    """Read with each verb that gives what is in a checkpoint."""
    with contextlib.closing(open_stream(uri, params)) as stream:
        streamed = stream.read()
    (tmp_path / "streamed").write_bytes(streamed)
    copies = [download(uri, tmp_path / "copy", transport_params=params), tmp_path / "streamed"]
    return [
        load(uri, transport_params=params)["epoch"],
        load(uri, transport_params=params, cached=True)["epoch"],
        *(load(copy)["epoch"] for copy in copies),
        peek(uri, transport_params=params).epoch,
    ]


@pytest.fixture
def versioned(s3: servers.Store) -> Any:
    """A bucket that keeps the versions of its objects."""
    with contextlib.suppress(s3.sdk.exceptions.BucketAlreadyOwnedByYou):
        s3.sdk.create_bucket(Bucket="kept")
    enabled = {"Status": "Enabled"}
    s3.sdk.put_bucket_versioning(Bucket="kept", VersioningConfiguration=enabled)
    return s3


# ── refused ───────────────────────────────────────────────────────────────────────────────────

PLACES = {
    "s3": "s3://bucket/a.ckpt",
    "gcs": "gs://bucket/a.ckpt",
    "azure": "az://bucket/a.ckpt",
    "http": "http://127.0.0.1:9/a.ckpt",
    "sftp": "sftp://127.0.0.1:9/a.ckpt",
    "ftp": "ftp://127.0.0.1:9/a.ckpt",
    "hdfs": "hdfs:///a.ckpt",
    "webhdfs": "webhdfs://127.0.0.1:9/a.ckpt",
}
VERBS = {
    "load": lambda uri, params: load(uri, transport_params=params),
    "peek": lambda uri, params: peek(uri, transport_params=params),
    "download": lambda uri, params: download(uri, "/nowhere/a", transport_params=params),
    "save": lambda uri, params: save({}, uri, transport_params=params),
    "list_objects": lambda uri, params: list_objects(
        uri.removesuffix("a.ckpt"), transport_params=params
    ),
    "latest": lambda uri, params: latest(uri.removesuffix("a.ckpt"), transport_params=params),
    "edit_metadata": lambda uri, params: anemoi_ckpt.edit_metadata(
        uri, dict, transport_params=params
    ),
    "open_stream": open_stream,
    "read_range": lambda uri, params: read_range(
        parse_uri(uri), 0, Buffers(bytearray(1)), None, params
    ),
    "read_version": lambda uri, params: read_version(parse_uri(uri), params),
}
CHANGES = {
    "open_writer": lambda uri, params: open_writer(uri, params).__enter__(),
    "remove_object": remove_object,
    "list_page": lambda uri, params: list_page(parse_uri(uri), None, params),
}


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("verb", VERBS)
def test_all_verbs_refuse_what_no_place_reads(kind: str, verb: str) -> None:
    with pytest.raises(TypeError, match=r"transport_params\['clientt'\] means nothing"):
        VERBS[verb](PLACES[kind], {"clientt": object()})


@pytest.mark.parametrize("kind", ["s3", "gcs", "azure"])
@pytest.mark.parametrize("verb", CHANGES)
def test_what_writes_lists_and_removes_refuses_it_too(kind: str, verb: str) -> None:
    with pytest.raises(TypeError, match=r"'clientt'\] means nothing .*is it 'client'\?"):
        CHANGES[verb](PLACES[kind], {"clientt": object()})


@pytest.mark.parametrize(
    ("kind", "params", "said"),
    [
        ("s3", {"versionid": "1"}, r"transport_params\['versionid'\].*is it 'version_id'\?"),
        ("s3", {"user_project": "p"}, r"'user_project'\] means nothing when a S3URI is read"),
        (
            "s3",
            {"client_kwargs": {"S3.Client.get_objet": {}}},
            r"\['client_kwargs'\]\['S3.Client.get_objet'\].*is it 'S3.Client.get_object'\?",
        ),
        ("gcs", {"get_blob_kwargs": {"generatoin": 1}}, r"is it 'generation'\?"),
        ("gcs", {"session": 1}, r"'session'\] means nothing when a GCSURI is read"),
        ("azure", {"blob_kwargs": {}}, r"'blob_kwargs'\] means nothing when a AzureURI is read"),
        ("azure", {"max_concurency": 1}, r"is it 'max_concurrency'\?"),
        ("http", {"haeders": {}}, r"is it 'headers'\?"),
        ("http", {"pasword": "1"}, r"is it 'password'\?"),
    ],
)
def test_the_nearest_known_name_is_told(kind: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        load(PLACES[kind], transport_params=params)


# ── S3 ────────────────────────────────────────────────────────────────────────────────────────


def versions(store: servers.Store) -> tuple[str, str]:
    """Store two versions of one object; give the older one's name, and the object's."""
    put = store.sdk.put_object
    version = put(Bucket="kept", Key="run/a.ckpt", Body=as_bytes(OLD))["VersionId"]
    put(Bucket="kept", Key="run/a.ckpt", Body=as_bytes(NEW))
    return version, "s3://kept/run/a.ckpt"


@pytest.mark.parametrize("how", ["version_id", "client_kwargs"])
def test_a_version_in_s3(versioned: servers.Store, how: str, tmp_path: Any) -> None:
    version, uri = versions(versioned)
    params: dict[str, Any] = {"version_id": version}
    if how == "client_kwargs":
        params = {"client_kwargs": {"S3.Client.get_object": {"VersionId": version}}}
    assert read_by_all(uri, {}, tmp_path) == [0] * 5
    assert read_by_all(uri, params, tmp_path) == [1] * 5


def test_two_versions_at_once_and_a_version_of_what_has_none(versioned: servers.Store) -> None:
    version, uri = versions(versioned)
    other = {"version_id": "another"}
    kwargs = {"client_kwargs": {"S3.Client.get_object": {"VersionId": "another"}}}
    for params in (other, kwargs):
        with pytest.raises(InvalidURIError, match=r"another.*leave one of them out"):
            load(f"{uri}?versionId={version}", transport_params=params)
    for verb in (list_objects, latest):
        with pytest.raises(InvalidURIError, match="a version names one object, not a folder"):
            verb("s3://kept/run/", transport_params=other)
    with pytest.raises(InvalidURIError, match="names a version that is there"):
        save(NEW, uri, transport_params=other)
    remove_object(uri, {"version_id": version})
    assert load(uri)["epoch"] == 0
    with pytest.raises(CheckpointError):
        load(uri, transport_params={"version_id": version})


def test_a_request_cannot_be_told_another_range(s3: servers.Store) -> None:
    s3.write("a.ckpt", as_bytes(OLD))
    params = {"client_kwargs": {"S3.Client.get_object": {"Range": "bytes=0-9"}}}
    with pytest.raises(InvalidURIError, match="client_kwargs ask for the Range 'bytes=0-9'"):
        load(s3.uri("a.ckpt"), transport_params=params)


def elsewhere(s3: servers.Store, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Take the store out of the environment, and give what reaches it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{servers.free_port()}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    return {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}


def test_the_constructor_of_the_client(s3: servers.Store, monkeypatch: Any, tmp_path: Any) -> None:
    uri = s3.uri("a.ckpt")
    s3.write("a.ckpt", as_bytes(OLD))
    config = botocore.config.Config(
        user_agent_extra="me/1", request_checksum_calculation="when_supported"
    )
    made = {"endpoint_url": s3.server.url, "config": config, **elsewhere(s3, monkeypatch)}
    params = {"client_kwargs": {"S3.Client": made}}
    assert read_by_all(uri, params, tmp_path) == [1] * 5
    assert all("me/1" in request.headers["User-Agent"] for request in s3.server.log)
    save(NEW, uri, transport_params=params)
    assert load(uri, transport_params=params)["epoch"] == 0
    assert latest(s3.uri(""), transport_params=params).text == uri


def test_a_session_of_boto3(s3: servers.Store, monkeypatch: Any, tmp_path: Any) -> None:
    uri = s3.uri("a.ckpt")
    s3.write("a.ckpt", as_bytes(OLD))
    (tmp_path / "config").write_text(f"[profile me]\nendpoint_url = {s3.server.url}\n")
    keys = elsewhere(s3, monkeypatch)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    params = {"session": boto3.Session(profile_name="me", region_name="us-east-1", **keys)}
    assert read_by_all(uri, params, tmp_path) == [1] * 5
    save(NEW, uri, transport_params=params)
    assert load(uri, transport_params=params)["epoch"] == 0


def test_who_asks_pays_and_the_owner_of_the_bucket_is_told(
    s3: servers.Store, tmp_path: Any
) -> None:
    s3.write("paid/a.ckpt", as_bytes(OLD))
    params = {"client_kwargs": {"S3.Client.get_object": {"RequestPayer": "requester"}}}
    assert read_by_all(s3.uri("paid/a.ckpt"), params, tmp_path) == [1] * 5
    assert latest(s3.uri("paid/"), transport_params=params).filename == "a.ckpt"
    assert {request.headers["x-amz-request-payer"] for request in s3.server.log} == {"requester"}


def test_a_key_of_ones_own_for_the_encryption(s3: servers.Store, tmp_path: Any) -> None:
    """S3 decrypts where each request has the key, and its ETag is no MD5 (SSE-C)."""
    data, uri = as_bytes(OLD), s3.uri("a.ckpt")
    s3.write("a.ckpt", data)
    name = "x-amz-server-side-encryption-customer-"

    def of_its_own(request: servers.Request) -> servers.Fault | None:
        if request.headers[f"{name}algorithm"] != "AES256":
            return servers.Fault(status=400)
        marks = {f"{name}algorithm": "AES256", "ETag": f'"{"0" * 32}"'}
        return servers.Fault(headers=marks, ignore_conditions=True)

    s3.server.fault = of_its_own
    key = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32}
    params = {"client_kwargs": {"S3.Client.get_object": key}}
    assert read_by_all(uri, params, tmp_path) == [1] * 5
    sent = {request.headers[f"{name}key"] for request in s3.server.log}
    assert sent == {base64.b64encode(b"k" * 32).decode()}
    with pytest.raises(CheckpointError):
        load(uri)


@pytest.mark.parametrize("size", [100_000, 10**9])
def test_no_request_asks_for_more_than_the_caller_wants(s3: servers.Store, size: int) -> None:
    s3.write("a.ckpt", as_bytes(BIG))
    assert_same(load(s3.uri("a.ckpt"), transport_params={"range_chunk_size": size}), BIG)
    asked = [request.range for request in s3.server.log if request.method == "GET"]
    ranges = [servers.byte_range(each, len(as_bytes(BIG))) for each in asked]
    assert all(len(each) <= size for each in ranges if each is not None)
    s3.server.reset()
    s3.server.fault = lambda request: servers.Fault(cut=70_000)
    assert_same(load(s3.uri("a.ckpt"), transport_params={"range_chunk_size": size}), BIG)
    buffer = bytearray(10)
    read_range(parse_uri(s3.uri("a.ckpt")), 0, Buffers(buffer), None, {"range_chunk_size": 3})
    assert bytes(buffer) == as_bytes(BIG)[:10]


@pytest.mark.parametrize(
    ("place", "params"),
    [
        ("s3", {"buffer_size": 7, "defer_seek": True}),
        ("azure", {"buffer_size": 7}),
        ("http", {"buffer_size": 7}),
    ],
    indirect=["place"],
)
def test_the_buffers_of_smart_open_change_nothing(place: Any, params: Any, tmp_path: Any) -> None:
    assert read_by_all(place.put("a.ckpt", as_bytes(OLD)), params, tmp_path) == [1] * 5


# ── GCS ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["get_blob_kwargs", "text"])
def test_a_generation_that_is_no_longer_live(gcs: servers.Store, how: str, tmp_path: Any) -> None:
    gcs.write("a.ckpt", as_bytes(OLD))
    generation = gcs.server.keep(servers.BUCKET, "a.ckpt")
    gcs.write("a.ckpt", as_bytes(NEW))
    uri, params = gcs.uri("a.ckpt"), {}
    assert read_by_all(uri, {}, tmp_path) == [0] * 5
    if how == "text":
        uri += f"#{generation}"
    else:
        params = {"get_blob_kwargs": {"generation": generation}}
    assert read_by_all(uri, params, tmp_path) == [1] * 5


def test_two_generations_at_once_and_one_of_what_has_none(gcs: servers.Store) -> None:
    params = {"get_blob_kwargs": {"generation": 2}}
    with pytest.raises(InvalidURIError, match="transport_params name another generation, 2"):
        load(gcs.uri("a.ckpt#1"), transport_params=params)
    with pytest.raises(InvalidURIError, match="a generation names one object, not a folder"):
        list_objects(gcs.uri("run/"), transport_params=params)
    with pytest.raises(InvalidURIError, match="names a version that is there"):
        save(NEW, gcs.uri("a.ckpt"), transport_params=params)


def test_a_server_that_sends_another_generation(gcs: servers.Store) -> None:
    gcs.write("a.ckpt", as_bytes(BIG))
    gcs.server.fault = lambda request: (
        servers.Fault(headers={"X-Goog-Generation": "7"}) if "alt=media" in request.query else None
    )
    with pytest.raises(anemoi_ckpt.ChangedError, match="is now 7"):
        load(gcs.uri("a.ckpt"))


def test_who_pays_in_gcs_a_key_and_preconditions(gcs: servers.Store, tmp_path: Any) -> None:
    gcs.write("run/a.ckpt", as_bytes(OLD))
    uri = gcs.uri("run/a.ckpt")
    key = b"k" * 32
    params = {
        "user_project": "payer",
        "get_blob_kwargs": {"encryption_key": key, "if_metageneration_match": 1, "timeout": 33},
    }
    assert read_by_all(uri, params, tmp_path) == [1] * 5
    assert all("userProject=payer" in request.query for request in gcs.server.log)
    assert all("ifMetagenerationMatch=1" in request.query for request in gcs.server.log)
    sent = {request.headers["X-Goog-Encryption-Key"] for request in gcs.server.log}
    assert sent == {base64.b64encode(key).decode()}
    gcs.server.reset()
    assert latest(gcs.uri("run/"), transport_params={"user_project": "payer"}).text == uri
    remove_object(uri, {"user_project": "payer"})
    assert all("userProject=payer" in request.query for request in gcs.server.log)


# ── Azure ─────────────────────────────────────────────────────────────────────────────────────


def azure_clients(store: servers.Store, name: str, monkeypatch: Any) -> dict[str, Any]:
    """Give the clients of the account, the container and the blob, without the environment's."""
    account = client_of(parse_uri(store.uri(name)), None)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    container = account.get_container_client(servers.BUCKET)
    return {"account": account, "container": container, "blob": container.get_blob_client(name)}


@pytest.mark.parametrize("kind", ["account", "container", "blob"])
def test_each_kind_of_azures_clients(
    azure: servers.Store, kind: str, monkeypatch: Any, tmp_path: Any
) -> None:
    azure.write("run/a.ckpt", as_bytes(OLD))
    uri = azure.uri("run/a.ckpt")
    params = {"client": azure_clients(azure, "run/a.ckpt", monkeypatch)[kind]}
    assert read_by_all(uri, params, tmp_path) == [1] * 5
    save(NEW, uri, transport_params=params)
    assert load(uri, transport_params=params)["epoch"] == 0
    if kind == "blob":
        with pytest.raises(InvalidURIError, match="is a blob's, and lists nothing"):
            list_page(parse_uri(uri), None, params)
    else:
        assert latest(azure.uri("run/"), transport_params=params).filename == "a.ckpt"


def test_a_client_of_another_container_or_blob(azure: servers.Store, monkeypatch: Any) -> None:
    azure.write("a.ckpt", as_bytes(OLD))
    azure.write("b.ckpt", as_bytes(NEW))
    clients = azure_clients(azure, "a.ckpt", monkeypatch)
    for uri, kind, said in (
        (azure.uri("b.ckpt"), "blob", "of the blob_name 'a.ckpt'"),
        ("az://other/a.ckpt", "container", "of the container_name"),
        (azure.uri("a.ckpt?snapshot=2020"), "blob", None),
    ):
        with pytest.raises(CheckpointError, match=said):
            load(uri, transport_params={"client": clients[kind]})


def test_how_many_connections_at_once(azure: servers.Store) -> None:
    azure.write("a.ckpt", as_bytes(BIG))
    uri = azure.uri("a.ckpt")
    azure.server.fault = lambda request: servers.Fault(delay=0.02)
    assert_same(load(uri), BIG)
    assert azure.server.most_at_once > 1
    azure.server.reset()
    azure.server.fault = lambda request: servers.Fault(delay=0.02)
    assert_same(load(uri, transport_params={"max_concurrency": 1}), BIG)
    assert azure.server.most_at_once == 1


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "params", [{"user": "me", "password": "pw"}, {"headers": {"Authorization": "Basic bWU6cHc="}}]
)
def test_user_and_password(http_server: servers.HTTPServer, params: Any, tmp_path: Any) -> None:
    uri = http_server.put("a.ckpt", as_bytes(OLD))
    http_server.fault = lambda request: servers.Fault(auth="me:pw")
    with pytest.raises(anemoi_ckpt.AccessDeniedError):
        load(uri)
    assert read_by_all(uri, params, tmp_path) == [1] * 5


def test_a_password_alone_is_sent(http_server: servers.HTTPServer, tmp_path: Any) -> None:
    uri = http_server.put("a.ckpt", as_bytes(OLD))
    http_server.fault = lambda request: servers.Fault(auth=":pw")
    assert read_by_all(uri, {"password": "pw"}, tmp_path) == [1] * 5


def test_kerberos(http_server: servers.HTTPServer, monkeypatch: Any, tmp_path: Any) -> None:
    uri = http_server.put("a.ckpt", as_bytes(OLD))
    monkeypatch.setitem(os.sys.modules, "requests_kerberos", None)
    with pytest.raises(anemoi_ckpt.MissingPackageError, match="pip install requests-kerberos"):
        load(uri, transport_params={"kerberos": True})

    class Kerberos:
        """As requests_kerberos, with a ticket for all."""

        HTTPKerberosAuth = staticmethod(lambda: requests.auth.HTTPBasicAuth("ticket", ""))

    monkeypatch.setitem(os.sys.modules, "requests_kerberos", Kerberos)
    http_server.fault = lambda request: servers.Fault(auth="ticket:")
    assert read_by_all(uri, {"kerberos": True}, tmp_path) == [1] * 5

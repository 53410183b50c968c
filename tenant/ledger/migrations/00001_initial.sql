-- +goose Up
-- Times are nanoseconds since 1970, 0 for never. Digests are 64 hexadecimal digits.

CREATE TABLE meta (
    name  TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT;
INSERT INTO meta (name, value) VALUES ('epoch', 1);

CREATE TABLE templates (
    name        TEXT PRIMARY KEY,
    sha256      TEXT NOT NULL,
    size        INTEGER NOT NULL,
    root_hash   TEXT NOT NULL,
    hash_offset INTEGER NOT NULL,
    release     TEXT NOT NULL,
    components  BLOB NOT NULL, -- JSON of the signed envelope
    audit       BLOB NOT NULL, -- JSON of the expectations
    created     INTEGER NOT NULL
) STRICT;

CREATE TABLE template_hosts (
    template TEXT NOT NULL REFERENCES templates (name) ON DELETE CASCADE,
    host     TEXT NOT NULL,
    PRIMARY KEY (template, host)
) STRICT;

CREATE TABLE objects (
    sha256 TEXT PRIMARY KEY,
    size   INTEGER NOT NULL,
    stored INTEGER NOT NULL
) STRICT;

CREATE TABLE hosts (
    name     TEXT PRIMARY KEY,
    clock    BLOB NOT NULL, -- JSON of the verifier's clock state
    standing TEXT NOT NULL, -- empty: good
    quoted   INTEGER NOT NULL
) STRICT;

CREATE TABLE reservations (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL,
    template   TEXT NOT NULL, -- its name; a template may be deleted before the history of its VMs
    size       TEXT NOT NULL,
    memory_mib INTEGER NOT NULL,
    workload   BLOB NOT NULL, -- JSON, or null
    phase      TEXT NOT NULL CHECK (phase IN ('reserved','booting','unlocking','connecting','computing','released','aborted')),
    start      INTEGER NOT NULL,
    deadline   INTEGER NOT NULL,
    reason     TEXT NOT NULL,
    detail     TEXT NOT NULL,
    findings   BLOB NOT NULL, -- JSON list
    host       TEXT NOT NULL,
    address    TEXT NOT NULL,
    mac        TEXT NOT NULL,
    volume     TEXT NOT NULL,
    formatted  INTEGER NOT NULL, -- 1: the volume holds a file system
    created    INTEGER NOT NULL,
    cleanup    TEXT NOT NULL CHECK (cleanup IN ('none','pending','done')),
    erase      INTEGER NOT NULL, -- 1: crypto-erase the volume in the clean-up
    deleted    INTEGER NOT NULL  -- when it was erased; its name is free from then on
) STRICT;
CREATE UNIQUE INDEX reservations_name ON reservations (name) WHERE deleted = 0;
-- An address is free again only once its VM is proven gone.
CREATE UNIQUE INDEX reservations_address ON reservations (address) WHERE cleanup <> 'done';
CREATE INDEX reservations_phase ON reservations (phase, deadline);

CREATE TABLE starts (
    reservation TEXT NOT NULL REFERENCES reservations (id),
    start       INTEGER NOT NULL,
    facts       BLOB NOT NULL, -- JSON of ledger.Start
    PRIMARY KEY (reservation, start)
) STRICT;

CREATE TABLE phases (
    reservation TEXT NOT NULL REFERENCES reservations (id),
    start       INTEGER NOT NULL,
    name        TEXT NOT NULL,
    began       INTEGER NOT NULL,
    ended       INTEGER NOT NULL,
    PRIMARY KEY (reservation, start, name)
) STRICT;

CREATE TABLE tokens (
    digest      TEXT PRIMARY KEY,
    kind        INTEGER NOT NULL,
    reservation TEXT NOT NULL REFERENCES reservations (id),
    start       INTEGER NOT NULL,
    phase       TEXT NOT NULL,
    source      TEXT NOT NULL,
    state       TEXT NOT NULL CHECK (state IN ('open','spent','void')),
    made        INTEGER NOT NULL,
    spent       INTEGER NOT NULL,
    spent_by    TEXT NOT NULL
) STRICT;
CREATE INDEX tokens_reservation ON tokens (reservation, state);

CREATE TABLE nonces (
    digest      TEXT PRIMARY KEY,
    reservation TEXT NOT NULL REFERENCES reservations (id),
    start       INTEGER NOT NULL,
    role        TEXT NOT NULL,
    issued      INTEGER NOT NULL,
    used        INTEGER NOT NULL
) STRICT;

CREATE TABLE verdicts (
    digest      TEXT PRIMARY KEY,
    reservation TEXT NOT NULL REFERENCES reservations (id),
    start       INTEGER NOT NULL,
    role        TEXT NOT NULL,
    host        TEXT NOT NULL,
    evidence    BLOB NOT NULL,
    made        INTEGER NOT NULL
) STRICT;

CREATE TABLE certificates (
    serial      TEXT PRIMARY KEY,
    reservation TEXT NOT NULL REFERENCES reservations (id),
    start       INTEGER NOT NULL,
    der         BLOB NOT NULL,
    expires     INTEGER NOT NULL,
    revoked     INTEGER NOT NULL
) STRICT;
CREATE INDEX certificates_reservation ON certificates (reservation);

CREATE TABLE zones (
    zone     TEXT PRIMARY KEY,
    revision INTEGER NOT NULL
) STRICT;

CREATE TABLE journal (
    seq         INTEGER PRIMARY KEY,
    hash        TEXT NOT NULL,
    reservation TEXT NOT NULL,
    origin      TEXT UNIQUE,   -- digest of an event that came from outside: the same one twice is one entry
    entry       BLOB NOT NULL  -- JSON of event.Event, exactly the bytes that are hashed
) STRICT;
CREATE INDEX journal_reservation ON journal (reservation, seq);

-- +goose Down
SELECT 'the ledger is never migrated down';

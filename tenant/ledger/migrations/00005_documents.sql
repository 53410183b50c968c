-- +goose Up
-- Signed documents that were taken into use: the provider's inventories, and reference
-- values. They stay, those that count no more too.
CREATE TABLE documents (
    kind         TEXT NOT NULL CHECK (kind IN ('inventory','platform')),
    sha256       TEXT NOT NULL, -- of the signed payload
    version      INTEGER NOT NULL, -- of an inventory; 0 of reference values
    envelope     BLOB NOT NULL, -- the file, byte for byte
    imported     INTEGER NOT NULL,
    imported_by  TEXT NOT NULL,
    withdrawn    INTEGER NOT NULL,
    withdrawn_by TEXT NOT NULL,
    why          TEXT NOT NULL, -- it was withdrawn
    PRIMARY KEY (kind, sha256)
) STRICT;
CREATE UNIQUE INDEX documents_version ON documents (version) WHERE kind = 'inventory';

-- What the tenant itself found of each host's keys, good and bad; keys is the SHA-256 over
-- the EK certificate, the attestation key and the session key.
CREATE TABLE host_keys (
    host      TEXT NOT NULL,
    keys      TEXT NOT NULL,
    aik       TEXT NOT NULL, -- SHA-256
    api       TEXT NOT NULL,
    inventory INTEGER NOT NULL, -- version that named them last
    state     TEXT NOT NULL CHECK (state IN ('unproved','validated','failed')),
    reason    TEXT NOT NULL,
    checked   INTEGER NOT NULL,
    PRIMARY KEY (host, keys)
) STRICT;

-- Why a host gets no VM until an operator readmits it; empty: nothing.
ALTER TABLE hosts ADD COLUMN barred TEXT NOT NULL DEFAULT '';

-- +goose Down
SELECT 'the ledger is never migrated down';

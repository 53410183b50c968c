-- +goose Up
-- The evidence of every decision, refused ones too. What many have in common - inventory,
-- reference values, logs - is kept once, under its digest. Of what is not kept any more the
-- link of its chain stays. The table verdicts holds what was judged before; nothing reads it.
CREATE TABLE evidence_parts (
    sha256 TEXT PRIMARY KEY,
    data   BLOB NOT NULL
) STRICT;

CREATE TABLE bundles (
    digest        TEXT PRIMARY KEY, -- of the verdict
    reservation   TEXT NOT NULL REFERENCES reservations (id),
    start         INTEGER NOT NULL,
    role          TEXT NOT NULL,
    host          TEXT NOT NULL,
    at            INTEGER NOT NULL,
    accepted      INTEGER NOT NULL,
    previous      TEXT NOT NULL,    -- '' for a boot verdict
    record_sha256 TEXT NOT NULL,
    kept          INTEGER NOT NULL, -- 0: what follows is empty
    record        BLOB NOT NULL,    -- JSON
    logs          TEXT NOT NULL,    -- in evidence_parts
    inventory     TEXT NOT NULL,
    platform      TEXT NOT NULL     -- '' where the host's release had no reference values
) STRICT;
CREATE INDEX bundles_start ON bundles (reservation, start);
CREATE INDEX bundles_kept ON bundles (reservation, role) WHERE kept = 1;
CREATE INDEX bundles_logs ON bundles (logs) WHERE kept = 1;
CREATE INDEX bundles_inventory ON bundles (inventory) WHERE kept = 1;
CREATE INDEX bundles_platform ON bundles (platform) WHERE kept = 1;
CREATE INDEX nonces_reservation ON nonces (reservation, issued);

-- +goose Down
SELECT 'the ledger is never migrated down';

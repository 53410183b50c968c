-- +goose NO TRANSACTION
-- +goose Up
-- A VM may stop and start again: phase 'stopped', whose deadline is when its next start
-- is due, 0 for never. SQLite changes a CHECK only by making the table anew.
-- +goose StatementBegin
PRAGMA foreign_keys = OFF;
BEGIN IMMEDIATE;
CREATE TABLE reservations_new (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL,
    template   TEXT NOT NULL, -- its name; a template may be deleted before the history of its VMs
    size       TEXT NOT NULL,
    memory_mib INTEGER NOT NULL,
    workload   BLOB NOT NULL, -- JSON, or null
    phase      TEXT NOT NULL CHECK (phase IN ('reserved','booting','unlocking','connecting','computing','stopped','released','aborted')),
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
    deleted    INTEGER NOT NULL, -- when it was erased; its name is free from then on
    restart    TEXT NOT NULL CHECK (restart IN ('always','on-failure','never')), -- policy
    restarts   INTEGER NOT NULL, -- in a row, since it last computed for long
    wish       TEXT NOT NULL CHECK (wish IN ('','stop','restart')), -- what an operator asked of the running VM
    wished     INTEGER NOT NULL, -- when
    gone       INTEGER NOT NULL  -- 1: it is stopped, and its host has confirmed that no instance is left
) STRICT;
INSERT INTO reservations_new SELECT id, name, template, size, memory_mib, workload, phase, start, deadline, reason, detail, findings,
    host, address, mac, volume, formatted, created, cleanup, erase, deleted, 'never', 0, '', 0, 0 FROM reservations;
DROP TABLE reservations;
ALTER TABLE reservations_new RENAME TO reservations;
CREATE UNIQUE INDEX reservations_name ON reservations (name) WHERE deleted = 0;
-- An address is free again only once its VM is proven gone.
CREATE UNIQUE INDEX reservations_address ON reservations (address) WHERE cleanup <> 'done';
CREATE INDEX reservations_phase ON reservations (phase, deadline);
COMMIT;
PRAGMA foreign_keys = ON;
-- +goose StatementEnd

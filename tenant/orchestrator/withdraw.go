package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"

	"foothold/protocol/event"
	"foothold/tenant/ledger"
)

// withdrawing is the turn of withdrawals; no reservation has that id.
const withdrawing = "templates"

// withdrawSuperseded withdraws each version of a template that a newer one has taken the
// place of, once no start of it can have an instance any more. The intent is stored
// first, so that no start takes the version from then on; then its key is destroyed,
// which makes every copy of its ciphertext noise; then its hosts delete theirs. The
// row stays, so that no registration brings the image back. A crash, or a host that is away, leaves the rest to the next sweep.
func (o *Orchestrator) withdrawSuperseded(ctx context.Context) {
	if o.cleaning.taken(withdrawing) {
		return
	}
	done, err := o.cleaning.take(ctx, withdrawing)
	if err != nil {
		return
	}
	defer done()
	var rows []ledger.Template
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		superseded, err := t.Superseded()
		if err != nil {
			return err
		}
		for _, tpl := range superseded {
			if err := errors.Join(t.Withdraw(tpl), t.Journal(withdrawal("template.withdrawing", tpl))); err != nil {
				return err
			}
		}
		all, err := t.Templates()
		for _, tpl := range all {
			if !tpl.Withdrawn.IsZero() && !tpl.Gone {
				rows = append(rows, tpl)
			}
		}
		return err
	})
	if err == nil && len(rows) > 0 {
		o.zones.journalled()
	}
	for _, tpl := range rows {
		err = errors.Join(err, o.finishWithdrawal(ctx, tpl))
	}
	if err != nil && ctx.Err() == nil {
		slog.Warn("withdrawal goes on", "error", err)
	}
}

func (o *Orchestrator) finishWithdrawal(ctx context.Context, tpl ledger.Template) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupLimit)
	defer cancel()
	if err := o.vault.Destroy(templateKeyName(tpl)); err != nil {
		return fmt.Errorf("destroy the key of template %s: %w", tpl.Label(), err)
	}
	var away error
	for _, host := range tpl.Hosts {
		away = errors.Join(away, o.withdrawAt(ctx, host, tpl))
	}
	if away != nil {
		return away
	}
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		return errors.Join(t.WithdrawalDone(tpl), t.Journal(withdrawal("template.withdrawn", tpl)))
	})
	o.zones.journalled()
	return err
}

// withdrawAt has a host delete its ciphertext. One that left the inventory is not asked:
// what it keeps is noise.
func (o *Orchestrator) withdrawAt(ctx context.Context, host string, tpl ledger.Template) error {
	if h, err := o.host(host); err == nil {
		err := h.DeleteTemplate(ctx, tpl.SHA256)
		if err != nil && event.ReasonOf(err) != event.UnknownTemplate {
			return fmt.Errorf("delete template %s at host %s: %w", tpl.Label(), host, err)
		}
	}
	return o.ledger.Write(ctx, func(t *ledger.Tx) error { return t.DropTemplateHost(tpl, host) })
}

func withdrawal(kind string, tpl ledger.Template) event.Event {
	return event.Event{Kind: kind, Detail: map[string]string{"name": tpl.Name, "version": strconv.Itoa(tpl.Version), "sha256": tpl.SHA256.String()}}
}

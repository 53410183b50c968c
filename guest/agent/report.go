package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"foothold/guest/pid1"
	"foothold/guest/pinned"
	"foothold/protocol/bootmsg"
	"foothold/protocol/event"
	"foothold/protocol/signed"
	"foothold/protocol/token"
)

// reportPause lies between two tries to deliver the report.
const reportPause = 500 * time.Millisecond

// report tells the orchestrator, through the boot server, that the delivered system
// runs. A connection that breaks is tried again with the same report; a refusal is
// final, because T2 is spent by then.
func (i *instance) report(ctx context.Context, kernel string) error {
	payload, err := json.Marshal(bootmsg.Report{Reservation: i.Reservation, Start: i.Start, T2: i.T2, Kernel: kernel, BootMillis: pid1.Uptime().Milliseconds()})
	if err != nil {
		return fmt.Errorf("encode the report: %w", err)
	}
	defer clear(payload)
	envelope := signed.Seal(i.key, signed.Report, payload)
	i.T2 = token.Token{}
	for {
		err := i.deliver(ctx, envelope)
		if err == nil {
			return nil
		}
		if errors.Is(err, pinned.ErrRefused) {
			return event.Refuse(event.ReportRefused, "%v", err)
		}
		select {
		case <-ctx.Done():
			return event.Refuse(pinned.Reason(err, event.BootServerFailed), "%v", err)
		case <-time.After(reportPause):
		}
	}
}

func (i *instance) deliver(ctx context.Context, envelope signed.Envelope) error {
	cert, err := pinned.Ephemeral()
	if err != nil {
		return err
	}
	link, err := pinned.Dial(ctx, pinned.Pins{URL: i.BootURL, ServerName: i.ServerName, CA: i.BootCA}, cert)
	if err != nil {
		return err
	}
	defer link.Close()
	var none struct{}
	return link.Post(ctx, bootmsg.PathReady, envelope, &none, bootmsg.MaxMessage)
}

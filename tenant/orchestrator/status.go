package orchestrator

import (
	"context"
	"crypto/ed25519"
	"log/slog"
	"strings"

	"foothold/protocol/api"
	"foothold/tenant/ledger"
)

func (o *Orchestrator) hostList(ctx context.Context) ([]api.Host, error) {
	list, b := []api.Host{}, o.basis()
	err := o.ledger.Read(ctx, func(t *ledger.Tx) error {
		live, err := t.Live()
		if err != nil {
			return err
		}
		for _, known := range b.inventory.Hosts() {
			h := known.Host
			state, err := t.Host(h.Name)
			if err != nil {
				return err
			}
			out := api.Host{Name: h.Name, API: h.API, Location: h.Location, Asset: h.Asset, Software: h.Software, Standing: "good", Quoted: state.Quoted}
			if state.Standing != "" {
				out.Standing = state.Standing
			}
			if err := b.mayHost(t, h.Name); unfit(err) {
				out.Standing = strings.TrimPrefix(detailOf(err), "host "+h.Name+": ")
			} else if err != nil {
				return err
			}
			for _, r := range live {
				if r.Host == h.Name {
					out.VMs++
				}
			}
			list = append(list, out)
		}
		return nil
	})
	return list, err
}

func (o *Orchestrator) status(ctx context.Context) (api.Status, error) {
	s := api.Status{Version: o.version, Profile: o.conf.Profile, Epoch: o.zones.epoch, Zones: o.zones.states()}
	err := o.ledger.Read(ctx, func(t *ledger.Tx) error {
		live, err := t.Live()
		if err != nil {
			return err
		}
		s.VMs = len(live)
		s.Refusals, err = t.Refusals()
		return err
	})
	return s, err
}

func logFault(err error) { slog.Error("fault", "error", err) }

func publicOf(key ed25519.PrivateKey) []byte { return key.Public().(ed25519.PublicKey) }

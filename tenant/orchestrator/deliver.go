package orchestrator

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"foothold/internal/bootimage"
	"foothold/internal/mtls"
	"foothold/protocol/bootmsg"
	"foothold/protocol/bundle"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/signed"
	"foothold/protocol/token"
	"foothold/protocol/upstream"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"
)

// releaseComponents is the orchestrator's half of act 6: it makes T2 and this start's
// unique part, signs its manifest, and stores the verdict and what was released upon it
// before it answers. T2 leaves inside the answer alone; after a crash it is lost and the
// boot runs out.
func (o *Orchestrator) releaseComponents(ctx context.Context, b *basis, admitted *verify.Admitted, r ledger.Reservation, v verify.Verdict) (upstream.VerdictResponse, error) {
	var out upstream.VerdictResponse
	tpl, shared, err := o.componentsOf(ctx, r)
	if err != nil {
		return out, errors.Join(err, o.keepVerdict(ctx, r, b, v, nil))
	}
	t2, account := token.New(token.T2), newAccount()
	login, err := o.loginKey(r.ID, r.Start)
	if err != nil {
		return out, errors.Join(err, o.keepVerdict(ctx, r, b, v, nil))
	}
	err = o.keepVerdict(ctx, r, b, v, func(t *ledger.Tx, s *ledger.Start) error {
		if _, err := o.permitted(t, admitted, r, reservation.Booting); err != nil {
			return err
		}
		var err error
		if out, err = o.delivery(r, *s, tpl, shared, unique{t2: t2, account: account, login: login.PublicKey().Marshal()}, v.Tunnel); err != nil {
			return err
		}
		s.Account, s.Cmdline = account, bootimage.GuestCmdline
		s.Components = []bootmsg.Component{shared.Kernel, shared.Initramfs, uniqueComponent(out.Unique)}
		return errors.Join(
			t.AddToken(ledger.Token{Digest: t2.Digest(), Kind: token.T2, Reservation: r.ID, Start: r.Start, Phase: reservation.Booting, Source: r.Address}),
			t.Journal(event.Event{Kind: "components.released", Reservation: r.ID, Detail: componentDetail(s.Components)}))
	})
	if err != nil {
		return upstream.VerdictResponse{}, err
	}
	return out, nil
}

// componentsOf reads the start's template and its shared components, whose signature it
// checks.
func (o *Orchestrator) componentsOf(ctx context.Context, r ledger.Reservation) (tpl ledger.Template, shared bootmsg.Components, err error) {
	if tpl, err = o.templateOf(ctx, r); err == nil {
		shared, err = o.components(tpl.Components)
	}
	return tpl, shared, err
}

// unique is what the unique part holds of this start's own.
type unique struct {
	t2      token.Token
	account string
	login   []byte // SSH public key, wire format
}

// vmClockSkew is how far a VM's clock, which is its host's, may run ahead of ours before it
// takes its manifest for expired. It gives no manifest a longer use: that is bound to one
// key, one tunnel and one start.
const vmClockSkew = 15 * time.Minute

// delivery makes the unique part and the signed manifest.
func (o *Orchestrator) delivery(r ledger.Reservation, s ledger.Start, tpl ledger.Template, shared bootmsg.Components, u unique, tunnel digest.SHA256) (upstream.VerdictResponse, error) {
	n := s.Spec.Network
	data, err := json.Marshal(bootmsg.Unique{
		Reservation: r.ID, Start: r.Start, Name: r.Name, Account: u.account, AuthorizedKey: u.login, T2: u.t2,
		Network: bootmsg.Network{MAC: n.MAC, Address: n.Address, Gateway: n.Gateway, MTU: n.MTU},
		BootURL: s.Spec.Boot.URL, ServerName: s.Spec.Boot.ServerName, BootCA: s.Spec.Boot.CA,
		ManifestKey: s.Spec.Boot.ManifestKey, Orchestrator: o.conf.Network.Self,
	})
	if err != nil {
		return upstream.VerdictResponse{}, fmt.Errorf("encode unique part: %w", err)
	}
	archive, err := bundle.Archive(bundle.File{Path: bundle.UniquePath, Data: data})
	if err != nil {
		return upstream.VerdictResponse{}, err
	}
	manifest, err := json.Marshal(bootmsg.Manifest{Reservation: r.ID, Start: r.Start, VMKey: s.VMKey, Tunnel: tunnel, Kernel: shared.Kernel,
		Initramfs: shared.Initramfs, Unique: uniqueComponent(archive), Cmdline: bootimage.GuestCmdline, Expires: r.Deadline.Add(vmClockSkew).UTC()})
	if err != nil {
		return upstream.VerdictResponse{}, fmt.Errorf("encode manifest: %w", err)
	}
	return upstream.VerdictResponse{
		Grant:  bootmsg.Grant{Manifest: signed.Seal(o.ground.manifestKey, signed.Manifest, manifest), Components: tpl.Components},
		Kernel: shared.Kernel, Initramfs: shared.Initramfs, Unique: archive,
	}, nil
}

func uniqueComponent(archive []byte) bootmsg.Component {
	return bootmsg.Component{Name: "unique", SHA256: digest.Of(archive), Size: int64(len(archive))}
}

func componentDetail(list []bootmsg.Component) map[string]string {
	out := map[string]string{}
	for _, c := range list {
		out[c.Name] = c.SHA256.String()
	}
	return out
}

// newAccount is the name of the one account that may log in, not to be guessed.
func newAccount() string {
	b := make([]byte, 8)
	rand.Read(b)
	return "unlock-" + hex.EncodeToString(b)
}

// bootDone hears from the boot server how the conversation ended.
func (o *Orchestrator) bootDone(ctx context.Context, who mtls.Identity, in upstream.DoneRequest) (empty, error) {
	r, s, err := o.fromBooting(ctx, in.Reservation, netip.Addr{})
	if err != nil {
		return empty{}, o.refusedCall(ctx, who, upstream.PathBootDone, r.ID, err)
	}
	if in.Reason != "" {
		o.abort(context.WithoutCancel(ctx), r.ID, r.Start, noQuote(s, bootFailure(in.Reason, in.Detail)))
		return empty{}, nil
	}
	if !sameComponents(in.Delivered, s.Components) {
		err := event.Refuse(event.DigestMismatch, "the boot server delivered other components than were released")
		o.abort(context.WithoutCancel(ctx), r.ID, r.Start, err)
		return empty{}, err
	}
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		return errors.Join(
			t.ChangeStart(r.ID, r.Start, func(s *ledger.Start) { s.Delivered = t.Now }),
			t.Journal(event.Event{Kind: "components.delivered", Reservation: r.ID, Detail: componentDetail(in.Delivered)}))
	})
	o.zones.journalled()
	return empty{}, err
}

// sameComponents compares regardless of the order in which the loader fetched.
func sameComponents(a, b []bootmsg.Component) bool {
	byName := func(x, y bootmsg.Component) int { return strings.Compare(x.Name, y.Name) }
	return slices.Equal(slices.SortedFunc(slices.Values(a), byName), slices.SortedFunc(slices.Values(b), byName))
}

// bootFailure is why a boot conversation failed, as the boot server says. A reason that
// this act does not know says nothing but that it failed.
func bootFailure(r event.Reason, detail string) error {
	said := "as the boot server reports"
	if detail = clip(detail, upstream.MaxDetail); detail != "" && !token.Within([]byte(detail)) {
		said += ": " + detail
	}
	switch r {
	case event.SignatureInvalid, event.DigestMismatch, event.LoaderFailed, event.BootServerFailed, event.TPMBusy, event.TPMCommandRefused,
		event.ChannelMisuse, event.QuoteRefused, event.DeadlinePassed:
		return event.Refuse(r, "%s", said)
	}
	return event.Refuse(event.BootServerFailed, "%s", said)
}

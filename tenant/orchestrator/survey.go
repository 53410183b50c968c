package orchestrator

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"sync"

	"foothold/internal/strictjson"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/platform"
	"foothold/tenant/ledger"
	"foothold/tenant/verify"

	"github.com/danielgtaylor/huma/v2"
)

// maxManifest bounds reference values that are tried, in bytes.
const maxManifest = 8 << 20

// surveyAtOnce is how many hosts are asked at once.
const surveyAtOnce = 32

// platformOperations say of hosts, for people, what they measure. Nothing is released,
// refused or stored by what they find.
func (o *Orchestrator) platformOperations(a huma.API) {
	huma.Register(a, operation("GET", "/v1/hosts/{name}/platform", "host-platform", "What a host measures, against the reference values in force", http.StatusOK),
		func(ctx context.Context, in *byName) (*body[api.Judged], error) {
			return answer(o.hostPlatform(ctx, in.Name))
		})
	huma.Register(a, operation("GET", "/v1/hosts/{name}/evidence", "host-evidence", "A host's logs as it gives them now", http.StatusOK),
		o.hostEvidence)
	try := operation("POST", "/v1/platform/try", "try-platform", "Hold every host against other reference values", http.StatusOK)
	try.MaxBodyBytes = maxManifest
	huma.Register(a, try, func(ctx context.Context, in *struct {
		Host string `query:"host" maxLength:"64" doc:"this host alone"`
		Body api.TryPlatform
	}) (*body[[]api.Judged], error) {
		var doc platform.Manifest
		if err := strictjson.Unmarshal(in.Body.Manifest, &doc); err != nil {
			return nil, problem(event.Refuse(event.BadRequest, "manifest: %v", err))
		}
		return answer(o.tryPlatform(ctx, doc, in.Host, caller(ctx)))
	})
}

// hostEvidence passes on what a host says of itself.
func (o *Orchestrator) hostEvidence(ctx context.Context, in *byName) (*huma.StreamResponse, error) {
	h, err := o.host(in.Name)
	if err != nil {
		return nil, problem(err)
	}
	logs, err := h.Platform(ctx)
	if err != nil {
		return nil, problem(err)
	}
	return &huma.StreamResponse{Body: func(c huma.Context) {
		c.SetHeader("Content-Type", "application/json")
		json.NewEncoder(c.BodyWriter()).Encode(logs)
	}}, nil
}

// hostPlatform asks a host what it runs. If it gives no answer, the newest that it gave for
// a VM stands for it.
func (o *Orchestrator) hostPlatform(ctx context.Context, name string) (api.Judged, error) {
	b := o.basis()
	standing, ok := b.inventory.Host(name)
	if !ok {
		return api.Judged{}, event.Refuse(event.NoHost, "host %q is not in the inventory", name)
	}
	current := b.verifier.Current()
	out := o.survey(ctx, current, name)
	if away := out.Problem; away != "" {
		stored, err := o.judgeStored(ctx, current, name)
		if err != nil {
			return out, err
		}
		for _, s := range stored {
			if out.Evidence == api.EvidenceAsked || s.At.After(out.At) {
				out, out.Problem = s, away
			}
		}
	}
	out.Release, out.By = standing.Host.Software, standing.Host.Software
	return out, nil
}

// tryPlatform holds what is known of every host, or of one, against reference values that
// are not in force: what its VMs' quotes proved last, and what it answers now.
func (o *Orchestrator) tryPlatform(ctx context.Context, doc platform.Manifest, only, who string) ([]api.Judged, error) {
	b := o.basis()
	trial, err := b.verifier.Try(doc, only != "")
	if err != nil {
		return nil, event.Refuse(event.BadRequest, "%v", err)
	}
	var hosts []verify.Standing
	for _, s := range b.inventory.Hosts() {
		if only == "" || s.Host.Name == only {
			hosts = append(hosts, s)
		}
	}
	if only != "" && len(hosts) == 0 {
		return nil, event.Refuse(event.NoHost, "host %q is not in the inventory", only)
	}
	found, errs := make([][]api.Judged, len(hosts)), make([]error, len(hosts))
	var wg sync.WaitGroup
	turns := make(chan struct{}, surveyAtOnce)
	for i, s := range hosts {
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			stored, err := o.judgeStored(ctx, trial, s.Host.Name)
			errs[i], found[i] = err, append([]api.Judged{o.survey(ctx, trial, s.Host.Name)}, stored...)
			for n := range found[i] {
				found[i][n].Release, found[i][n].By = s.Host.Software, doc.Name
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	list, refused := []api.Judged{}, 0
	for _, judged := range found {
		for _, j := range judged {
			if !j.Accepted {
				refused++
			}
			list = append(list, j)
		}
	}
	o.journal(ctx, event.Event{Kind: "platform.tried", Detail: map[string]string{"release": doc.Name, "by": who,
		"judged": strconv.Itoa(len(list)), "not_accepted": strconv.Itoa(refused)}})
	return list, nil
}

// survey asks one host, for no VM, and judges the answer.
func (o *Orchestrator) survey(ctx context.Context, t *verify.Trial, name string) api.Judged {
	out := api.Judged{Host: name, Evidence: api.EvidenceAsked, At: o.now().UTC(), Findings: []event.FailedCheck{}}
	verdict, err := o.askHost(ctx, t, name)
	if err != nil {
		out.Problem = shown(err).Error()
		return out
	}
	return judged(out, verdict)
}

// askHost has a host quote over a nonce that nothing else has.
func (o *Orchestrator) askHost(ctx context.Context, t *verify.Trial, name string) (verify.Verdict, error) {
	var none verify.Verdict
	h, err := o.host(name)
	if err != nil {
		return none, err
	}
	var state ledger.HostState
	if err := o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { state, err = t.Host(name); return err }); err != nil {
		return none, err
	}
	clocks, err := verify.ParseClocks(state.Clock)
	if err != nil {
		return none, err
	}
	nonce := make([]byte, evidence.NonceLen)
	rand.Read(nonce)
	q, err := h.Quote(ctx, evidence.SurveyBinding(name, nonce))
	if err != nil {
		return none, err
	}
	return t.Survey(name, nonce, t.Last(name, clocks), verify.StaticEvidence{Quote: q.Quote, Platform: q.Platform}), nil
}

// judgeStored judges the newest evidence that is kept of each live VM at the host: an
// acceptance, or a refusal.
func (o *Orchestrator) judgeStored(ctx context.Context, trial *verify.Trial, name string) ([]api.Judged, error) {
	type subject struct {
		vm    string
		parts verify.Parts
	}
	var subjects []subject
	err := o.ledger.Read(ctx, func(t *ledger.Tx) error {
		live, err := t.Live()
		if err != nil {
			return err
		}
		for _, r := range live {
			if r.Host != name {
				continue
			}
			newest, err := t.NewestBundle(r.ID, r.Start)
			if err != nil {
				return err
			}
			if newest.IsZero() {
				continue
			}
			parts, err := t.Bundle(r.ID, newest)
			if err != nil {
				return err
			}
			subjects = append(subjects, subject{r.Name, parts})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var list []api.Judged
	for _, s := range subjects {
		link := s.parts.Link
		out := api.Judged{Host: name, Evidence: api.EvidenceStored, VM: s.vm, Role: link.Role, At: link.At.UTC(), Findings: []event.FailedCheck{}}
		verdict, err := trial.Stored(s.parts)
		if err != nil {
			out.Problem = err.Error()
		} else {
			out = judged(out, verdict)
		}
		list = append(list, out)
	}
	return list, nil
}

func judged(out api.Judged, v verify.Verdict) api.Judged {
	out.Accepted = v.Good()
	if !v.Manifest.IsZero() {
		out.Manifest = &v.Manifest
	}
	out.Findings = append(out.Findings, v.Findings...)
	return out
}

#include "scheduler/scheduler_impl.h"

namespace slidecore {

Ticket Scheduler::Impl::new_ticket() {
  retire_tickets();
  tickets.push_back({});
  return first_ticket + tickets.size() - 1;
}

void Scheduler::Impl::issue_ticket(Ticket ticket, StreamHandle stream) {
  TicketState& state = tickets[ticket - first_ticket];
  state.event = events.take();
  device->record(state.event, stream);
  state.issued = true;
  changed.notify_all();
}

bool Scheduler::Impl::ticket_issued(Ticket ticket) const {
  return ticket < first_ticket || tickets[ticket - first_ticket].issued;
}

EventHandle Scheduler::Impl::ticket_event(Ticket ticket) const {
  return ticket < first_ticket ? 0 : tickets[ticket - first_ticket].event;
}

// Tickets are retired oldest first; one that is done behind an unfinished one only holds its event a little longer.
void Scheduler::Impl::retire_tickets() {
  while (!tickets.empty() && tickets.front().issued && device->done(tickets.front().event)) {
    events.give(tickets.front().event);
    tickets.pop_front();
    ++first_ticket;
  }
}

}  // namespace slidecore
